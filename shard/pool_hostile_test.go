package shard

import (
	"bytes"
	"encoding/binary"
	"sync/atomic"
	"testing"

	"spindle/codec"

	"golang.org/x/net/http2"
)

// Members are not trusted: one that floods, lies or sends nonsense loses its connection or the call, by a bound that is
// counted, and the next call goes to a new connection. Each attack answers the first call; the calls after it get
// an honest answer.
func TestPoolHostileMember(t *testing.T) {
	const endless = 1 << 20 // more than any bound
	flood := func(fr *http2.Framer, write func() error) {
		for range endless {
			if write() != nil {
				return
			}
		}
	}
	for name, a := range map[string]struct {
		limit  codec.Limit
		attack func(fr *http2.Framer, id uint32)
	}{
		"SETTINGS flood": {codec.LimitIdleFrames, func(fr *http2.Framer, _ uint32) { flood(fr, func() error { return fr.WriteSettings() }) }},
		"PING flood, deaf": {codec.LimitControl, func(fr *http2.Framer, _ uint32) {
			flood(fr, func() error { return fr.WritePing(false, [8]byte{1}) })
		}},
		"empty DATA": {codec.LimitIdleFrames, func(fr *http2.Framer, id uint32) {
			rawHeaders(fr, id, false, ":status", "200", "content-type", "application/grpc")
			flood(fr, func() error { return fr.WriteData(id, false, nil) })
		}},
		"PRIORITY churn": {codec.LimitIdleFrames, func(fr *http2.Framer, _ uint32) {
			flood(fr, func() error { return fr.WritePriority(9, http2.PriorityParam{StreamDep: 3}) })
		}},
		"unknown frames": {codec.LimitIdleFrames, func(fr *http2.Framer, _ uint32) {
			flood(fr, func() error { return fr.WriteRawFrame(0x77, 0, 0, nil) })
		}},
		"CONTINUATION flood": {codec.LimitContinuations, func(fr *http2.Framer, id uint32) {
			_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: []byte{0x88}})
			flood(fr, func() error { return fr.WriteContinuation(id, false, []byte{0x88}) })
		}},
		"CONTINUATION bytes": {codec.LimitHeaderBlock, func(fr *http2.Framer, id uint32) {
			_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: []byte{0x88}})
			flood(fr, func() error { return fr.WriteContinuation(id, false, make([]byte, 16<<10)) })
		}},
		"many fields": {codec.LimitHeaderList, func(fr *http2.Framer, id uint32) {
			rawHeaders(fr, id, false, append([]string{":status", "200", "content-type", "application/grpc"}, make100("x", "")...)...)
		}},
		"large fields": {codec.LimitHeaderList, func(fr *http2.Framer, id uint32) {
			rawHeaders(fr, id, false, ":status", "200", "content-type", "application/grpc", "x", string(bytes.Repeat([]byte("x"), 15<<10)), "y", string(bytes.Repeat([]byte("x"), 1<<10)))
		}},
		"lying length": {codec.LimitMessage, func(fr *http2.Framer, id uint32) {
			rawHeaders(fr, id, false, ":status", "200", "content-type", "application/grpc")
			_ = fr.WriteData(id, false, binary.BigEndian.AppendUint32([]byte{0}, 1<<32-1))
		}},
		"frame of 16 MiB": {codec.LimitProtocol, func(fr *http2.Framer, id uint32) {
			_ = fr.WriteRawFrame(http2.FrameData, 0, id, make([]byte, 1<<24-1))
		}},
		"MAX_FRAME_SIZE 0": {codec.LimitProtocol, func(fr *http2.Framer, _ uint32) {
			_ = fr.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 0})
		}},
		"window overflow": {codec.LimitProtocol, func(fr *http2.Framer, _ uint32) { _ = fr.WriteWindowUpdate(0, 1<<31-1) }},
		"more than the window": {codec.LimitProtocol, func(fr *http2.Framer, id uint32) {
			rawHeaders(fr, id, false, ":status", "200", "content-type", "application/grpc")
			flood(fr, func() error { return fr.WriteData(5, false, make([]byte, 16<<10)) })
		}},
		"a push": {codec.LimitProtocol, func(fr *http2.Framer, id uint32) {
			_ = fr.WritePushPromise(http2.PushPromiseParam{StreamID: id, PromiseID: 2, BlockFragment: []byte{0x82}, EndHeaders: true})
		}},
		"HPACK nonsense": {codec.LimitProtocol, func(fr *http2.Framer, id uint32) {
			_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, EndHeaders: true})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var calls atomic.Int32
			addr := rawMember(t, func(fr *http2.Framer, f http2.Frame) {
				d, ok := f.(*http2.DataFrame)
				if !ok || !d.StreamEnded() {
					return
				}
				if calls.Add(1) > 1 {
					rawAnswer(fr, d.StreamID, "x")
					return
				}
				fr.AllowIllegalWrites = true
				a.attack(fr, d.StreamID)
			})
			e := newPoolEnv(t, []string{"http://" + addr})
			e.connected(0)
			if r := e.call(codec.MethodTxn, []byte("x")); r.st.Code == codec.OK || !r.sent {
				t.Errorf("%+v", r)
			}
			e.connected(0)
			if r := e.call(codec.MethodTxn, []byte("x")); r.st.Code != codec.OK || string(r.resp) != "x" {
				t.Errorf("the next call: %+v", r)
			}
			if n := e.counter(metricPoolLimit, "shard-1", a.limit); n == 0 {
				t.Error("not counted")
			}
			var held int
			e.loop.do(func() {
				for _, l := range e.pool.links {
					held += l.conn.Partial()
				}
			})
			if held != 0 {
				t.Errorf("%d bytes are held", held)
			}
		})
	}
}

func make100(kv ...string) (out []string) {
	for range 100 {
		out = append(out, kv...)
	}
	return out
}
