package codec

import (
	"bytes"
	"slices"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// fuzzBlocks cuts fuzz input into header blocks: a length, the block.
func fuzzBlocks(in []byte) (blocks [][]byte) {
	for len(in) > 0 && len(blocks) < 40 {
		n := min(int(in[0]), len(in)-1)
		blocks = append(blocks, in[1:1+n])
		in = in[1+n:]
	}
	return blocks
}

// FuzzHeaderBlocks feeds a row of header blocks to a connection's decoder and to x/net's: what one takes, the
// other takes, and they read the same; a block that is remembered means what it meant before.
func FuzzHeaderBlocks(f *testing.F) {
	add := func(blocks ...[]byte) {
		var in []byte
		for _, b := range blocks {
			in = append(append(in, byte(len(b))), b...)
		}
		f.Add(in)
	}
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	encode := func(kv ...string) []byte {
		buf.Reset()
		for i := 0; i < len(kv); i += 2 {
			enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
		}
		return bytes.Clone(buf.Bytes())
	}
	honest := func(timeout string) []byte {
		return encode(":method", "POST", ":scheme", "http", ":path", "/etcdserverpb.KV/Range", ":authority", "h",
			"content-type", "application/grpc", "te", "trailers", "grpc-timeout", timeout)
	}
	add(honest("1S"), honest("1S"), honest("2S"), honest("1S"))
	add(fuzzRequests[0], fuzzRequests[0], []byte{0x20, 0x82}, fuzzRequests[0])
	add([]byte{0x20, 0x3f, 0xe1, 0x1f, 0x82}, honest("3u"), []byte{0x20, 0x20, 0x20, 0x82})
	add(append(honest("1n"), 0x20))
	add(trailersOK, trailersOK, appendStatusFields(nil, Status{NotFound, "x%\n"}))
	f.Fuzz(func(t *testing.T, in []byte) {
		defer watchdog()()
		const maxBytes, maxFields = 400, 12
		d := headerDecoder{maxBytes: maxBytes, maxFields: maxFields}
		var got []hpack.HeaderField
		ref := hpack.NewDecoder(hpackTable, func(hf hpack.HeaderField) { got = append(got, hf) })
		for i, block := range fuzzBlocks(in) {
			got = got[:0]
			fs, err := d.decode(block, i&1)
			shape := scanBlock(block)
			if shape.bad != nil {
				if err == nil {
					t.Fatalf("block %d: %v is accepted", i, shape.bad)
				}
				return
			}
			// x/net takes one size update at the start of a block only; RFC 7541 4.2 allows two.
			rest, refErr := block, error(nil)
			for ; shape.updates > 1 && refErr == nil; shape.updates-- {
				n := intLen(rest, 5)
				_, refErr = ref.DecodeFull(rest[:n])
				rest = rest[n:]
			}
			if refErr == nil {
				if _, refErr = ref.Write(rest); refErr == nil {
					refErr = ref.Close()
				}
			}
			if (err != nil) != (refErr != nil) {
				t.Fatalf("block %d %x: %v, x/net says %v", i, block, err, refErr)
			}
			if err != nil {
				return
			}
			size := 0
			for _, hf := range got {
				size += int(hf.Size())
			}
			over := size > maxBytes || len(got) > maxFields
			if fs.overLimit != over {
				t.Fatalf("block %d: %d bytes, %d fields: overLimit is %v", i, size, len(got), fs.overLimit)
			}
			if over {
				continue
			}
			want := fields{contentLength: -1}
			for _, hf := range got {
				want.numField++
				want.bytes += int(hf.Size())
				switch {
				case hf.Name == "" || !validValue(hf.Value):
					want.bad("invalid header field")
				case hf.IsPseudo():
					want.addPseudo(hf.Name, hf.Value)
				case !validName(hf.Name):
					want.bad("invalid header field name")
				default:
					want.sawRegular = true
					want.addRegular(hf.Name, hf.Value)
				}
			}
			if *fs != want {
				t.Fatalf("block %d %x:\n got %+v\nwant %+v", i, block, *fs, want)
			}
		}
	})
}

// FuzzRequestEncoder encodes requests and lets x/net's decoder read them.
func FuzzRequestEncoder(f *testing.F) {
	f.Add("127.0.0.1:2379", "/etcdserverpb.KV/Range", []byte{1, 2, 3, 200, 4, 5})
	f.Fuzz(func(t *testing.T, authority, path string, steps []byte) {
		defer watchdog()()
		if len(authority)+len(path) > 8<<10 || len(steps) > 500 {
			return
		}
		e := requestEncoder{authority: authority}
		dec := hpack.NewDecoder(hpackTable, nil)
		for i, step := range steps {
			if step == 255 {
				e.setTableSize(100)
			}
			p := path + string(rune('a'+step%50))
			timeout := time.Duration(step) * time.Duration(i)
			hfs, err := dec.DecodeFull(e.append(nil, p, step&1 == 0, timeout))
			if err != nil {
				t.Fatal(err)
			}
			value := func(name string) string {
				for _, hf := range hfs {
					if hf.Name == name {
						return hf.Value
					}
				}
				return ""
			}
			got, err := parseTimeout(value("grpc-timeout"))
			if timeout > 0 && (err != nil || got < timeout) || timeout == 0 && err == nil {
				t.Fatalf("timeout %v became %v %v", timeout, got, err)
			}
			if value(":path") != p || value(":authority") != authority || (value("hasleader") == "true") != (step&1 == 0) {
				t.Fatalf("%q %q became %v", authority, p, hfs)
			}
			if e.size > hpackTable || len(e.entries) > hpackTable/32 {
				t.Fatalf("a table of %d bytes", e.size)
			}
		}
	})
}

// FuzzGRPCStatus: what is sent as grpc-message comes back, within its bound, and stays within ASCII.
func FuzzGRPCStatus(f *testing.F) {
	f.Add(uint32(5), "etcdserver: requested lease not found")
	f.Add(uint32(2), "100%\n\xff\u00e9 \u65e5")
	f.Fuzz(func(t *testing.T, code uint32, msg string) {
		defer watchdog()()
		block := appendStatusFields(nil, Status{Code(code), msg})
		if len(block) > maxStatusText+64 {
			t.Fatalf("%d bytes of trailers", len(block))
		}
		d := headerDecoder{maxBytes: 1 << 20, maxFields: 64}
		fs, err := d.decode(block, 1)
		if err != nil || fs.checkTrailers() != "" {
			t.Fatalf("%v %q", err, fs.checkTrailers())
		}
		for i := 0; i < len(fs.grpcMessage); i++ {
			if c := fs.grpcMessage[i]; c < ' ' || c > '~' {
				t.Fatalf("%q is sent as %q", msg, fs.grpcMessage)
			}
		}
		st, ok := parseGRPCStatus(fs)
		if !ok && code <= 1<<31-1 {
			t.Fatalf("code %d: %v", code, st)
		}
		if !ok || code == 0 {
			return
		}
		if uint32(st.Code) != code || utf8.ValidString(msg) && len(msg)*3 <= maxStatusText && st.Msg != msg {
			t.Fatalf("%d %q became %v", code, msg, st)
		}
		// And anything as it may come from a member.
		decodeGRPCMessage(msg)
		if d, err := parseTimeout(msg); err == nil && d < 0 {
			t.Fatalf("timeout %q is %v", msg, d)
		}
	})
}

// FuzzKV compares Fields, ParseKV, ParseHeader and their appenders with generated protobuf: they accept the same
// where no field has another wire type than etcd's, and write the same.
func FuzzKV(f *testing.F) {
	kv := mvccpb.KeyValue{Key: []byte("k"), CreateRevision: 1, ModRevision: -2, Version: 3, Value: []byte("v"), Lease: 1 << 60}
	b, _ := proto.Marshal(&kv)
	f.Add(b)
	f.Add([]byte{0x0b, 0x0c, 0x0a, 1, 'k'})
	f.Add([]byte{0xf8, 0xff, 0xff, 0xff, 0x0f, 1})
	f.Fuzz(func(t *testing.T, msg []byte) {
		defer watchdog()()
		var want mvccpb.KeyValue
		err := proto.Unmarshal(msg, &want)
		got, ok := ParseKV(msg)
		if ok != (err == nil) {
			t.Fatalf("%x: ParseKV %v, protobuf says %v", msg, ok, err)
		}
		var raw []byte
		proper := true
		for it := (Fields{Msg: msg}); it.Next(); {
			raw = append(raw, it.Field.Raw...)
			isBytes := it.Field.Num == 1 || it.Field.Num == 5
			if it.Field.Num <= 6 && (isBytes != (it.Field.Type == protowire.BytesType) || !isBytes && it.Field.Type != protowire.VarintType) {
				proper = false
			}
		}
		if !ok {
			return
		}
		if !bytes.Equal(raw, msg) {
			t.Fatalf("%x walked as %x", msg, raw)
		}
		if !proper {
			return // protobuf takes such a field for an unknown one; no etcd sends it
		}
		if string(got.Key) != string(want.Key) || string(got.Value) != string(want.Value) || got.CreateRevision != want.CreateRevision ||
			got.ModRevision != want.ModRevision || got.Version != want.Version || got.Lease != want.Lease {
			t.Fatalf("%x: %+v, want %v", msg, got, &want)
		}
		want.ProtoReflect().SetUnknown(nil)
		back, _ := proto.MarshalOptions{Deterministic: true}.Marshal(&want)
		if out := AppendKV(nil, &got); !bytes.Equal(out, back) {
			t.Fatalf("%x became %x, want %x", msg, out, back)
		}
		if n := len(AppendKV(nil, &got)); n > len(got.Key)+len(got.Value)+MaxKVHeader {
			t.Fatalf("%d bytes", n)
		}
		h, hok := ParseHeader(msg)
		var wantH pb.ResponseHeader
		if err := proto.Unmarshal(msg, &wantH); hok != (err == nil) {
			t.Fatalf("%x: ParseHeader %v, protobuf says %v", msg, hok, err)
		}
		nested := AppendHeaderField(nil, &h)
		back, _ = proto.Marshal(&pb.ResponseHeader{ClusterId: h.ClusterID, MemberId: h.MemberID, Revision: h.Revision, RaftTerm: h.RaftTerm})
		if !slices.Equal(nested, fuzzField1(back)) {
			t.Fatalf("header %+v: %x", h, nested)
		}
	})
}

// fuzzField1 frames b as field 1.
func fuzzField1(b []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), b)
}

// FuzzMessages: messages nest and get the lengths that protowire gives them.
func FuzzMessages(f *testing.F) {
	f.Add([]byte{3, 'a', 'b', 'c', 200, 5})
	f.Fuzz(func(t *testing.T, in []byte) {
		defer watchdog()()
		var got, want []byte
		for len(in) > 0 {
			n := int(in[0])
			if n > 100 {
				n *= 90 // lengths of two and three bytes
			}
			in = in[1:]
			body := bytes.Repeat([]byte{byte(n)}, n)
			var outer, inner int
			got, outer = BeginMessage(got, 2)
			got = AppendBytes(got, 1, body)
			got, inner = BeginMessage(got, 300)
			got = append(got, body...)
			got = EndMessage(got, inner)
			got = EndMessage(got, outer)
			msg := AppendBytes(nil, 1, body)
			msg = protowire.AppendBytes(protowire.AppendTag(msg, 300, protowire.BytesType), body)
			want = protowire.AppendBytes(protowire.AppendTag(want, 2, protowire.BytesType), msg)
			if len(got) > 1<<20 {
				break
			}
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%x, want %x", got, want)
		}
	})
}
