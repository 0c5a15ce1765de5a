package codec

import (
	"bytes"
	"testing"

	"golang.org/x/net/http2"
)

// Every frame writer against the bytes of golang.org/x/net/http2's Framer.
func TestFrameWritersMatchFramer(t *testing.T) {
	big := bytes.Repeat([]byte{7}, 3*maxFrameSize+5)
	tests := []struct {
		name string
		ours []byte
		ref  func(f *http2.Framer) error
	}{
		{"data", append(appendFrameHeader(nil, 3, frameData, flagEndStream, 5), "abc"...),
			func(f *http2.Framer) error { return f.WriteData(5, true, []byte("abc")) }},
		{"headers", appendHeaders(nil, maxStreamID, true, []byte("block")), func(f *http2.Framer) error {
			return f.WriteHeaders(http2.HeadersFrameParam{StreamID: maxStreamID, BlockFragment: []byte("block"),
				EndStream: true, EndHeaders: true})
		}},
		{"headers and continuations", appendHeaders(nil, 3, false, big), func(f *http2.Framer) error {
			if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: big[:maxFrameSize]}); err != nil {
				return err
			}
			f.WriteContinuation(3, false, big[maxFrameSize:2*maxFrameSize])
			f.WriteContinuation(3, false, big[2*maxFrameSize:3*maxFrameSize])
			return f.WriteContinuation(3, true, big[3*maxFrameSize:])
		}},
		{"rst", appendRSTStream(nil, 9, h2RefusedStream),
			func(f *http2.Framer) error { return f.WriteRSTStream(9, http2.ErrCodeRefusedStream) }},
		{"settings", appendSetting(appendSetting(appendFrameHeader(nil, 12, frameSettings, 0, 0),
			settingInitialWindowSize, 1<<20), settingMaxConcurrentStreams, 7), func(f *http2.Framer) error {
			return f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20},
				http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 7})
		}},
		{"settings ack", appendSettingsAck(nil), func(f *http2.Framer) error { return f.WriteSettingsAck() }},
		{"ping", appendPing(nil, false, [8]byte{1, 2, 3, 4, 5, 6, 7, 8}),
			func(f *http2.Framer) error { return f.WritePing(false, [8]byte{1, 2, 3, 4, 5, 6, 7, 8}) }},
		{"ping ack", appendPing(nil, true, [8]byte{8}),
			func(f *http2.Framer) error { return f.WritePing(true, [8]byte{8}) }},
		{"goaway", appendGoAway(nil, 11, h2EnhanceYourCalm, "why"),
			func(f *http2.Framer) error { return f.WriteGoAway(11, http2.ErrCodeEnhanceYourCalm, []byte("why")) }},
		{"window update", appendWindowUpdate(nil, 0, maxWindow),
			func(f *http2.Framer) error { return f.WriteWindowUpdate(0, maxWindow) }},
	}
	for _, tt := range tests {
		var want bytes.Buffer
		if err := tt.ref(http2.NewFramer(&want, nil)); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if !bytes.Equal(tt.ours, want.Bytes()) {
			t.Errorf("%s: got % x, want % x", tt.name, tt.ours, want.Bytes())
		}
		h := parseFrameHeader(tt.ours)
		ref, err := http2.ReadFrameHeader(bytes.NewReader(tt.ours))
		if err != nil || h.length != ref.Length || h.typ != uint8(ref.Type) || h.flags != uint8(ref.Flags) || h.stream != ref.StreamID {
			t.Errorf("%s: parsed %+v, want %+v (%v)", tt.name, h, ref, err)
		}
	}
}

func TestH2CodeNames(t *testing.T) {
	for c := h2NoError; c <= h2HTTP11Required; c++ {
		if want := http2.ErrCode(c).String(); c.String() != want {
			t.Errorf("%d: got %s, want %s", c, c, want)
		}
	}
	if s := h2Code(4711).String(); s != "unknown error code 4711" {
		t.Error(s)
	}
}

func TestQueueAndBuffers(t *testing.T) {
	var q queue
	var want []byte
	for i := 0; i < 300; i++ {
		p := bytes.Repeat([]byte{byte(i)}, i*7)
		q.push(p)
		want = append(want, p...)
	}
	var got []byte
	for q.n > 0 {
		got = q.popAppend(got, min(q.n, 1+len(got)%5000))
	}
	if !bytes.Equal(got, want) || q.head != nil || q.tail != nil || q.mem != 0 {
		t.Fatal("queue lost or changed bytes")
	}
	q.push(want)
	q.drop()
	if q.n != 0 || q.head != nil {
		t.Fatal("drop left something")
	}
	for _, n := range []int{0, 1, 512, 513, 1024, 1 << 20, 1<<20 + 1, 4 << 20, 4<<20 + 1, 5<<20 - 1, 9<<20 + 1, 32 << 20, 32<<20 + 1} {
		b := getBuffer(n)
		if cap(b.b) < n || len(b.b) != 0 {
			t.Fatalf("getBuffer(%d): len %d cap %d", n, len(b.b), cap(b.b))
		}
		putBuffer(b)
	}
}
