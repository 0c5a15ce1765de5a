package codec

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"
)

func newTestDecoder() *headerDecoder { return &headerDecoder{maxBytes: 16 << 10, maxFields: 64} }

// encodeBlock encodes "name: value" pairs with x/net's encoder.
func encodeBlock(enc *hpack.Encoder, buf *bytes.Buffer, kv ...string) []byte {
	buf.Reset()
	for i := 0; i < len(kv); i += 2 {
		enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
	}
	return bytes.Clone(buf.Bytes())
}

var goodRequest = []string{":method", "POST", ":scheme", "http", ":path", "/etcdserverpb.KV/Range",
	":authority", "a:1", "content-type", "application/grpc", "te", "trailers", "grpc-timeout", "5S",
	"hasleader", "true", "grpc-encoding", "gzip", "content-length", "12"}

func TestHeaderDecoderFields(t *testing.T) {
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	d := newTestDecoder()
	for i := 0; i < 4; i++ { // the first block fills the table, later ones are cached
		f, err := d.decode(encodeBlock(enc, &buf, goodRequest...), 0)
		if err != nil {
			t.Fatal(err)
		}
		if f.checkRequest() != "" || f.method != "POST" || f.path != MethodPath(MethodRange) || f.timeout != "5S" ||
			!f.hasLeader || f.encoding != "gzip" || f.contentLength != 12 || f.contentType != "application/grpc" {
			t.Fatalf("block %d: %+v", i, f)
		}
	}
	if c := d.cached[0]; c == nil || !c.valid {
		t.Error("an indexed block was not remembered")
	}
	// A block that changes the table ends the cache's validity.
	if _, err := d.decode(encodeBlock(enc, &buf, append([]string{"x-new", "1"}, goodRequest...)...), 0); err == nil && d.cached[0].valid {
		t.Error("the cache outlived a change of the table")
	}
}

// The cache must never change what a block means: a random mix of blocks against a decoder without cache.
func TestHeaderCacheIsTransparent(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 1))
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	d := newTestDecoder()
	ref := hpack.NewDecoder(hpackTable, nil)
	for i := 0; i < 5000; i++ {
		path := fmt.Sprintf("/s/%d", rnd.IntN(3))
		kv := []string{":method", "POST", ":scheme", "http", ":path", path}
		if rnd.IntN(4) == 0 {
			kv = append(kv, "grpc-timeout", fmt.Sprintf("%dm", rnd.IntN(5000)))
		}
		if rnd.IntN(50) == 0 {
			enc.SetMaxDynamicTableSize(uint32(rnd.IntN(4097)))
		}
		block := encodeBlock(enc, &buf, kv...)
		f, err := d.decode(block, 0)
		if err != nil {
			// x/net's reference decoder refuses two size updates in one block; ours must not.
			t.Fatalf("seed %d, block %d: %v", seed, i, err)
		}
		want, timeout := "", ""
		ref.SetEmitFunc(func(hf hpack.HeaderField) {
			switch hf.Name {
			case ":path":
				want = hf.Value
			case "grpc-timeout":
				timeout = hf.Value
			}
		})
		for s := scanBlock(block); s.updates > 1; s.updates-- {
			n := intLen(block, 5)
			ref.Write(block[:n])
			ref.Close()
			block = block[n:]
		}
		if _, err := ref.Write(block); err != nil {
			t.Fatalf("seed %d, block %d: reference: %v", seed, i, err)
		}
		ref.Close()
		if f.path != want || f.path != path || f.timeout != timeout {
			t.Fatalf("seed %d, block %d: path %q timeout %q, want %q %q", seed, i, f.path, f.timeout, want, timeout)
		}
	}
}

func TestHeaderRules(t *testing.T) {
	req := func(extra ...string) []string {
		return append([]string{":method", "POST", ":scheme", "http", ":path", "/a/b", ":authority", "x"}, extra...)
	}
	tests := []struct {
		name string
		kv   []string
		bad  bool
	}{
		{"good", req("te", "trailers"), false},
		{"upper case", req("X-Y", "1"), true},
		{"space in name", req("x y", "1"), true},
		{"newline in value", req("x", "a\nb"), true},
		{"connection", req("connection", "close"), true},
		{"te gzip", req("te", "gzip"), true},
		{"transfer-encoding", req("transfer-encoding", "chunked"), true},
		{"late pseudo", append([]string{"x", "1"}, req()...), true},
		{"twice", req(":path", "/c"), true},
		{"status", req(":status", "200"), true},
		{"unknown pseudo", req(":protocol", "x"), true},
		{"no path", []string{":method", "POST", ":scheme", "http"}, true},
		{"empty path", []string{":method", "POST", ":scheme", "http", ":path", ""}, true},
		{"content-length", req("content-length", "-1"), true},
		{"content-lengths", req("content-length", "1", "content-length", "2"), true},
	}
	for _, tt := range tests {
		var buf bytes.Buffer
		f, err := newTestDecoder().decode(encodeBlock(hpack.NewEncoder(&buf), &buf, tt.kv...), 0)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if (f.checkRequest() != "") != tt.bad {
			t.Errorf("%s: %q", tt.name, f.checkRequest())
		}
	}
}

// Beyond the limits the fields are dropped, and the table stays the encoder's.
func TestHeaderLimitsKeepTable(t *testing.T) {
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	d := newTestDecoder()
	many := append([]string(nil), goodRequest...)
	for i := 0; i < 70; i++ {
		many = append(many, "x", fmt.Sprint(i%40))
	}
	f, err := d.decode(encodeBlock(enc, &buf, many...), 0)
	if err != nil || !f.overLimit {
		t.Fatalf("%+v %v", f, err)
	}
	f, err = d.decode(encodeBlock(enc, &buf, append(goodRequest, "x", strings.Repeat("v", 17<<10))...), 0)
	if err != nil || !f.overLimit {
		t.Fatalf("%+v %v", f, err)
	}
	f, err = d.decode(encodeBlock(enc, &buf, goodRequest...), 0)
	if err != nil || f.overLimit || f.path != MethodPath(MethodRange) {
		t.Fatalf("%+v %v", f, err)
	}
	// An HPACK bomb: one entry of nearly the whole table, named thousands of times.
	bomb := appendHpackInt(nil, 0x40, 6, 0)
	bomb = appendHpackString(bomb, "x")
	bomb = appendHpackString(bomb, strings.Repeat("b", 4000))
	for i := 0; i < 10000; i++ {
		bomb = append(bomb, 0x80|62)
	}
	f, err = d.decode(bomb, 0)
	if err != nil || !f.overLimit || f.bytes > d.maxBytes+4100 {
		t.Fatalf("%+v %v", f, err)
	}
}

func TestHeaderDecoderNeverPanics(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 2))
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	for i := 0; i < 20000; i++ {
		d := newTestDecoder()
		block := encodeBlock(enc, &buf, goodRequest...)
		if i%2 == 0 {
			block = make([]byte, rnd.IntN(40))
			for j := range block {
				block[j] = byte(rnd.Uint32())
			}
		} else {
			enc = hpack.NewEncoder(&buf)
			block[rnd.IntN(len(block))] ^= 1 << rnd.IntN(8)
		}
		if f, err := d.decode(block, 0); err == nil {
			f.checkRequest()
			parseGRPCStatus(f)
		}
	}
}

// What the encoders of both sides write, read by x/net's decoder.
func TestHeaderEncoders(t *testing.T) {
	read := func(dec *hpack.Decoder, block []byte) string {
		fs, err := dec.DecodeFull(block)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for _, f := range fs {
			fmt.Fprintf(&b, "%s=%s;", f.Name, f.Value)
		}
		return b.String()
	}
	dec := hpack.NewDecoder(hpackTable, nil)
	if got := read(dec, responseHeaders); got != ":status=200;content-type=application/grpc;" {
		t.Error(got)
	}
	if got := read(dec, appendStatusFields(nil, Status{})); got != "grpc-status=0;" {
		t.Error(got)
	}
	if got := read(dec, appendStatusFields(nil, Status{OutOfRange, "a%b\nü"})); got != "grpc-status=11;grpc-message=a%25b%0A%C3%BC;" {
		t.Error(got)
	}
	if got := read(dec, appendHTTPStatus(nil, 415)); got != ":status=415;" {
		t.Error(got)
	}

	e := requestEncoder{authority: "h:1"}
	reqDec := hpack.NewDecoder(hpackTable, nil)
	want := func(path, extra string) string {
		return ":method=POST;:scheme=http;:path=" + path + ";:authority=h:1;content-type=application/grpc;te=trailers;" + extra
	}
	sizes := map[int]bool{}
	for i := 0; i < 200; i++ { // many paths fill the table; then it must stop indexing
		path := fmt.Sprintf("/s/m%d", i%100)
		block := e.append(nil, path, i%2 == 0, time.Duration(i)*time.Millisecond)
		extra := ""
		if i%2 == 0 {
			extra += "hasleader=true;"
		}
		if i > 0 {
			extra += fmt.Sprintf("grpc-timeout=%s;", appendTimeout(nil, time.Duration(i)*time.Millisecond))
		}
		if got := read(reqDec, block); got != want(path, extra) {
			t.Fatalf("%d: %s", i, got)
		}
		sizes[len(e.append(nil, "/s/m0", false, 0))] = true
	}
	if !sizes[6] {
		t.Errorf("a repeated request takes %v bytes, want 6", sizes)
	}
	e.setTableSize(100)
	reqDec.SetAllowedMaxDynamicTableSize(100)
	for i := 0; i < 2; i++ {
		if got := read(reqDec, e.append(nil, "/s/m0", false, 0)); got != want("/s/m0", "") {
			t.Fatal(got)
		}
	}

	// A token goes with every request.
	e = requestEncoder{authority: "h:1", token: "a.b"}
	reqDec = hpack.NewDecoder(hpackTable, nil)
	for range 2 {
		if got := read(reqDec, e.append(nil, "/s/m0", false, 0)); got != want("/s/m0", "token=a.b;") {
			t.Fatal(got)
		}
	}
}
