package server

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"
)

// peer is a client that speaks HTTP/2 frame by frame, so that it can do what grpc-go does not.
type peer struct {
	t   testing.TB
	c   net.Conn
	w   *bufio.Writer
	fr  *http2.Framer
	enc *hpack.Encoder
	hdr bytes.Buffer

	status       map[uint32][2]string // grpc-status and grpc-message of ended streams
	streamFrames int                  // HEADERS and DATA seen
	dataBytes    int

	goAwayOK  bool      // GOAWAY is no failure
	holdPings bool      // the server's PINGs are answered by answerPings only
	pings     [][8]byte // not answered yet
}

func newPeer(t testing.TB, c net.Conn) *peer {
	t.Helper()
	p := &peer{t: t, c: c, w: bufio.NewWriter(c), status: map[uint32][2]string{}}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(guard))
	p.fr = http2.NewFramer(p.w, bufio.NewReader(c))
	p.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	p.enc = hpack.NewEncoder(&p.hdr)
	p.must(p.w.WriteString(http2.ClientPreface))
	p.check(p.fr.WriteSettings())
	p.check(p.w.Flush())
	return p
}

func (p *peer) must(_ int, err error) { p.check(err) }
func (p *peer) check(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatalf("peer: %v", err)
	}
}

// openWindows lets the server send as much as HTTP/2 can say.
func (p *peer) openWindows() {
	p.check(p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1}))
	p.check(p.fr.WriteWindowUpdate(0, 1<<31-1-65535))
	p.check(p.w.Flush())
}

// request sends a unary request whole.
func (p *peer) request(id uint32, path, timeout string, msg []byte) {
	p.t.Helper()
	p.hdr.Reset()
	fields := []string{":method", "POST", ":scheme", "http", ":path", path, ":authority", "test",
		"content-type", "application/grpc", "te", "trailers"}
	if timeout != "" {
		fields = append(fields, "grpc-timeout", timeout)
	}
	for i := 0; i < len(fields); i += 2 {
		p.check(p.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}))
	}
	p.check(p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.hdr.Bytes(), EndHeaders: true}))
	framed := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg)))
	p.check(p.fr.WriteData(id, true, append(framed, msg...)))
	p.check(p.w.Flush())
}

// read handles one frame of the server's.
func (p *peer) read() http2.Frame {
	p.t.Helper()
	f, err := p.fr.ReadFrame()
	p.check(err)
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if !f.IsAck() {
			p.check(p.fr.WriteSettingsAck())
			p.check(p.w.Flush())
		}
	case *http2.PingFrame:
		if f.IsAck() {
			break
		}
		p.pings = append(p.pings, f.Data)
		if !p.holdPings {
			p.answerPings()
		}
	case *http2.MetaHeadersFrame:
		p.streamFrames++
		if f.StreamEnded() {
			var st [2]string
			for _, h := range f.Fields {
				switch h.Name {
				case "grpc-status":
					st[0] = h.Value
				case "grpc-message":
					st[1] = h.Value
				}
			}
			p.status[f.StreamID] = st
		}
	case *http2.DataFrame:
		p.streamFrames++
		p.dataBytes += len(f.Data())
	case *http2.GoAwayFrame:
		if !p.goAwayOK {
			p.t.Fatalf("peer: GOAWAY %v %s", f.ErrCode, f.DebugData())
		}
	}
	return f
}

func (p *peer) answerPings() {
	p.t.Helper()
	for _, data := range p.pings {
		p.check(p.fr.WritePing(true, data))
	}
	p.pings = nil
	p.check(p.w.Flush())
}

// trailers waits for the end of a stream.
func (p *peer) trailers(id uint32) (code, msg string) {
	p.t.Helper()
	for {
		if st, ok := p.status[id]; ok {
			return st[0], st[1]
		}
		if f, ok := p.read().(*http2.RSTStreamFrame); ok && f.StreamID == id {
			return "reset", f.ErrCode.String()
		}
	}
}

// ping waits for the server's answer to a PING, and with it for all that was sent before.
func (p *peer) ping() {
	p.t.Helper()
	p.check(p.fr.WritePing(false, [8]byte{1}))
	p.check(p.w.Flush())
	for {
		if f, ok := p.read().(*http2.PingFrame); ok && f.IsAck() {
			return
		}
	}
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
