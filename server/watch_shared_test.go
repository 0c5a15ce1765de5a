package server

import (
	"bytes"
	"encoding/binary"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/watchring"
)

// recordSock keeps what is written.
type recordSock struct {
	fakeSock
	out []byte
}

func (f *recordSock) Write(p []byte) (int, error) { f.out = append(f.out, p...); return len(p), nil }

// Two watches of one key, whose clients give no window for a while, share the events that wait, and each gets its own
// responses.
func TestTwoSlowWatches(t *testing.T) {
	r := newClockRig(t)
	e := r.loop.eng
	t.Cleanup(func() { close(e.done) })
	sock := &recordSock{}
	r.conn.sock = sock
	front := watchring.NewFrontier(1, 0)
	ring := watchring.NewRing(64, 1<<30, 0)
	svc := NewWatchService(e, WatchConfig{Ring: ring, Frontier: front,
		ShardsOf: func(key, end []byte) int { return 0 },
		Now:      func(func(int64, codec.Status)) {}})
	r.greet(65_535)
	const watches = 2 // with IDs from 1 on
	streamOf := func(id int64) uint32 { return uint32(2*id - 1) }
	for id := int64(1); id <= watches; id++ {
		r.send(streamOf(id), WatchPath, false, marshal(t, &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{
			CreateRequest: &pb.WatchCreateRequest{Key: []byte("k"), StartRevision: 1, WatchId: id}}}))
	}
	for i, size := range []int{100_000, 20_000, 100} { // uses up the windows; is shared while it waits; is small
		rev := int64(i + 1)
		body := marshal(t, &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: make([]byte, size), ModRevision: rev}})
		ring.Publish(&watchring.Entry{Rev: rev, Size: len(body), Events: []watchring.Event{{Key: []byte("k"), Body: body, NoPrev: len(body)}}})
		front.Set(0, rev)
		svc.FrontierRose()
		r.mail()
	}
	for range 40 {
		for id := int64(1); id <= watches; id++ {
			r.window(streamOf(id), 1<<12)
		}
	}
	got := map[uint32][]byte{}
	for out := sock.out; len(out) > 0; {
		n := 9 + int(binary.BigEndian.Uint32(out)>>8)
		if id := binary.BigEndian.Uint32(out[5:]); out[3] == 0 { // DATA
			got[id] = append(got[id], out[9:n]...)
		}
		out = out[n:]
	}
	for id := int64(1); id <= watches; id++ {
		events := 0
		for b := got[streamOf(id)]; len(b) > 0; {
			n := 5 + int(binary.BigEndian.Uint32(b[1:]))
			if b[0] != 0 || n > len(b) {
				t.Fatalf("watch %d: a message of %d bytes, flag %d, where %d are left", id, n, b[0], len(b))
			}
			m := new(pb.WatchResponse)
			if err := proto.Unmarshal(b[5:n], m); err != nil {
				t.Fatal(err)
			}
			if m.WatchId != id {
				t.Errorf("the stream of watch %d got a response of watch %d", id, m.WatchId)
			}
			for _, ev := range m.Events {
				if events++; ev.Kv.ModRevision != int64(events) || bytes.Count(ev.Kv.Value, []byte{0}) != len(ev.Kv.Value) {
					t.Errorf("watch %d: event %d is not what happened", id, events)
				}
			}
			b = b[n:]
		}
		if events != 3 {
			t.Errorf("watch %d got %d events of 3", id, events)
		}
	}
}
