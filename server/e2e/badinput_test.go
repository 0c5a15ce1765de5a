package e2e

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}
func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

var _ encoding.CodecV2 = rawCodec{}

// invoke calls any method with any bytes.
func (s *rpc) invoke(ctx context.Context, method string, body []byte) ([]byte, error) {
	var out []byte
	err := s.conn.Invoke(ctx, method, &body, &out, grpc.ForceCodecV2(rawCodec{}))
	return out, err
}

func putOp(key, value string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}
}

func deleteOp(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
}

func rangeOp(key, end string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end)}}}
}

func repeatOp(n int, f func(i int) *pb.RequestOp) (ops []*pb.RequestOp) {
	for i := range n {
		ops = append(ops, f(i))
	}
	return ops
}

// Requests that etcd refuses get etcd's own error: the same code and the same text.
func TestBadInput(t *testing.T) {
	etcd := dial(t, startEtcd(t))
	spindle := dial(t, startSpindle(t, 3, 1, nil)[0].ClientURLs()[0])
	ctx := testContext(t)

	// Both get a few revisions, and a compaction.
	var revs [2][]int64
	for side, s := range []*rpc{etcd, spindle} {
		for i := range 6 {
			r, err := s.kv.Put(ctx, &pb.PutRequest{Key: []byte("k"), Value: fmt.Appendf(nil, "%d", i)})
			if err != nil {
				t.Fatal(err)
			}
			revs[side] = append(revs[side], r.Header.Revision)
		}
		if _, err := s.kv.Compact(ctx, &pb.CompactionRequest{Revision: revs[side][3]}); err != nil {
			t.Fatalf("compact: %v", err)
		}
	}
	const big = 2 << 20
	future := int64(1) << 40
	for _, c := range []struct {
		name string
		req  func(side int) proto.Message
		ok   bool // etcd accepts it
	}{
		{name: "put without a key", req: func(int) proto.Message { return &pb.PutRequest{Value: []byte("v")} }},
		{name: "range without a key", req: func(int) proto.Message { return &pb.RangeRequest{} }},
		{name: "delete without a key", req: func(int) proto.Message { return &pb.DeleteRangeRequest{} }},
		{name: "txn put without a key", req: func(int) proto.Message { return &pb.TxnRequest{Success: []*pb.RequestOp{putOp("", "v")}} }},
		{name: "txn compare without a key", req: func(int) proto.Message {
			return &pb.TxnRequest{Compare: []*pb.Compare{{Target: pb.Compare_MOD}}, Success: []*pb.RequestOp{putOp("k", "v")}}
		}},
		{name: "txn with an empty operation", req: func(int) proto.Message {
			return &pb.TxnRequest{Success: []*pb.RequestOp{{}}}
		}},
		{name: "value of 2 MiB", req: func(int) proto.Message { return &pb.PutRequest{Key: []byte("k"), Value: make([]byte, big)} }},
		{name: "value of 2 MiB in a txn", req: func(int) proto.Message {
			return &pb.TxnRequest{Success: []*pb.RequestOp{putOp("k", strings.Repeat("x", big))}}
		}},
		{name: "key of 2 MiB", req: func(int) proto.Message { return &pb.PutRequest{Key: bytes.Repeat([]byte("k"), big)} }},
		{name: "200 puts", req: func(int) proto.Message {
			return &pb.TxnRequest{Success: repeatOp(200, func(i int) *pb.RequestOp { return putOp(fmt.Sprintf("k%d", i), "v") })}
		}},
		{name: "200 operations in the else", req: func(int) proto.Message {
			return &pb.TxnRequest{Failure: repeatOp(200, func(int) *pb.RequestOp { return rangeOp("k", "") })}
		}},
		{name: "200 compares", req: func(int) proto.Message {
			r := &pb.TxnRequest{Success: []*pb.RequestOp{putOp("k", "v")}}
			for range 200 {
				r.Compare = append(r.Compare, &pb.Compare{Key: []byte("k"), Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{}})
			}
			return r
		}},
		{name: "200 operations one level down", req: func(int) proto.Message {
			inner := &pb.TxnRequest{Success: repeatOp(200, func(int) *pb.RequestOp { return rangeOp("k", "") })}
			return &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: inner}}}}
		}},
		{name: "same key put twice", req: func(int) proto.Message {
			return &pb.TxnRequest{Success: []*pb.RequestOp{putOp("k", "1"), putOp("k", "2")}}
		}},
		{name: "same key put twice in the else", req: func(int) proto.Message {
			return &pb.TxnRequest{Failure: []*pb.RequestOp{putOp("k", "1"), putOp("k", "2")}}
		}},
		{name: "same key put twice, one nested", req: func(int) proto.Message {
			inner := &pb.TxnRequest{Success: []*pb.RequestOp{putOp("k", "1")}}
			return &pb.TxnRequest{Success: []*pb.RequestOp{putOp("k", "2"), {Request: &pb.RequestOp_RequestTxn{RequestTxn: inner}}}}
		}},
		{name: "put and delete of one key", req: func(int) proto.Message {
			return &pb.TxnRequest{Success: []*pb.RequestOp{putOp("k", "1"), deleteOp("k", "")}}
		}},
		{name: "future revision", req: func(int) proto.Message { return &pb.RangeRequest{Key: []byte("k"), Revision: future} }},
		{name: "future revision, list", req: func(int) proto.Message {
			return &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Revision: future}
		}},
		{name: "compacted revision", req: func(side int) proto.Message { return &pb.RangeRequest{Key: []byte("k"), Revision: revs[side][1]} }},
		{name: "compacted revision, empty range", req: func(side int) proto.Message {
			return &pb.RangeRequest{Key: []byte("nothing/"), RangeEnd: []byte("nothing0"), Revision: revs[side][1]}
		}},
		{name: "compacted revision in a txn", req: func(side int) proto.Message {
			return &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("k"), Revision: revs[side][1]}}}}}
		}},
		{name: "compact what is compacted", req: func(side int) proto.Message { return &pb.CompactionRequest{Revision: revs[side][3]} }},
		{name: "compact the future", req: func(int) proto.Message { return &pb.CompactionRequest{Revision: future} }},
		{name: "compact at 0", req: func(int) proto.Message { return &pb.CompactionRequest{} }},
		{name: "negative limit", ok: true, req: func(int) proto.Message {
			return &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), Limit: -1}
		}},
		{name: "negative revision", ok: true, req: func(int) proto.Message { return &pb.RangeRequest{Key: []byte("k"), Revision: -7} }},
		{name: "range that ends before it begins", ok: true, req: func(int) proto.Message {
			return &pb.RangeRequest{Key: []byte("z"), RangeEnd: []byte("a")}
		}},
		{name: "unknown sort order", req: func(int) proto.Message {
			return &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), SortOrder: 9}
		}},
		{name: "unknown sort target", req: func(int) proto.Message {
			return &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z"), SortOrder: 1, SortTarget: 9}
		}},
		{name: "ignore_value with a value", req: func(int) proto.Message {
			return &pb.PutRequest{Key: []byte("k"), Value: []byte("v"), IgnoreValue: true}
		}},
		{name: "ignore_value on a missing key", req: func(int) proto.Message {
			return &pb.PutRequest{Key: []byte("missing"), IgnoreValue: true}
		}},
		{name: "ignore_lease with a lease", req: func(int) proto.Message {
			return &pb.PutRequest{Key: []byte("k"), Lease: 7, IgnoreLease: true}
		}},
		{name: "ignore_lease on a missing key", req: func(int) proto.Message {
			return &pb.PutRequest{Key: []byte("missing"), Value: []byte("v"), IgnoreLease: true}
		}},
		{name: "lease that is not there", req: func(int) proto.Message {
			return &pb.PutRequest{Key: []byte("k"), Value: []byte("v"), Lease: 4711}
		}},
		{name: "empty txn", ok: true, req: func(int) proto.Message { return &pb.TxnRequest{} }},
		{name: "empty value", ok: true, req: func(int) proto.Message { return &pb.PutRequest{Key: []byte("k2")} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			var errs [2]error
			for side, s := range []*rpc{etcd, spindle} {
				_, errs[side] = call(callContext(t), s, c.req(side))
			}
			if (errs[0] == nil) != c.ok {
				t.Fatalf("the test is wrong: etcd says %v", errs[0])
			}
			if a, b := errText(errs[0]), errText(errs[1]); a != b {
				t.Errorf("etcd:    %s\nspindle: %s", a, b)
			}
		})
	}

	// What Spindle keeps for itself.
	for _, c := range []struct {
		name string
		req  proto.Message
	}{
		{"put of a reserved key", &pb.PutRequest{Key: []byte("\x00clock"), Value: []byte("v")}},
		{"delete of a reserved key", &pb.DeleteRangeRequest{Key: []byte("\x00map")}},
		{"get of a reserved key", &pb.RangeRequest{Key: []byte("\x00map")}},
		{"reserved key in a txn", &pb.TxnRequest{Success: []*pb.RequestOp{putOp("\x00clock", "v")}}},
		{"reserved key in a nested txn's else", &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{
			RequestTxn: &pb.TxnRequest{Failure: []*pb.RequestOp{deleteOp("\x00clock", "")}}}}}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := call(callContext(t), spindle, c.req)
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("%v", err)
			}
		})
	}
	t.Run("reserved keys do not show", func(t *testing.T) {
		for _, r := range []*pb.RangeRequest{
			{Key: []byte{0}, RangeEnd: []byte{0}},
			{Key: []byte{0}, RangeEnd: []byte{0xff}},
			{Key: []byte{0}, RangeEnd: []byte{0}, Revision: revs[1][4]},
		} {
			resp, err := spindle.kv.Range(callContext(t), r)
			if err != nil {
				t.Fatal(err)
			}
			for _, kv := range resp.Kvs {
				if kv.Key[0] == 0 {
					t.Errorf("%q shows", kv.Key)
				}
			}
			if int(resp.Count) != len(resp.Kvs) {
				t.Errorf("count %d with %d keys", resp.Count, len(resp.Kvs))
			}
		}
		resp, err := spindle.kv.DeleteRange(callContext(t), &pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
		if err != nil {
			t.Fatal(err)
		}
		if resp.Deleted < 1 || resp.Deleted > 2 {
			t.Errorf("deleted %d", resp.Deleted)
		}
	})
	t.Run("alive afterwards", func(t *testing.T) {
		if _, err := spindle.kv.Put(callContext(t), &pb.PutRequest{Key: []byte("k"), Value: []byte("v")}); err != nil {
			t.Error(err)
		}
	})
}

// A key may stand in what a member gets more often than in what the client sent. What then is too large for etcd, or even
// for its gRPC, is refused at once with etcd's error, and holds nobody back.
func TestLargeKeys(t *testing.T) {
	t.Parallel()
	spindle := dial(t, startSpindle(t, 1, 1, nil)[0].ClientURLs()[0])
	refused := 0
	for _, kib := range []int{400, 600, 750, 1100, 1500} {
		key := bytes.Repeat([]byte("k"), kib<<10)
		for _, req := range []proto.Message{
			&pb.PutRequest{Key: key},
			&pb.PutRequest{Key: key, PrevKv: true},
			&pb.DeleteRangeRequest{Key: key},
			&pb.TxnRequest{Success: []*pb.RequestOp{rangeOp(string(key), "")}},
		} {
			_, err := call(callContext(t), spindle, req)
			switch {
			case err == nil:
			case kib > 400 && errText(err) == "InvalidArgument: etcdserver: request is too large":
				refused++
			default:
				t.Errorf("%d KiB, %T: %v", kib, req, err)
			}
		}
	}
	if refused == 0 {
		t.Error("nothing was refused: the test is out of date")
	}
	errs := make(chan error, 100)
	for i := range cap(errs) { // so many that not all of them fit in one batch
		go func() {
			key := append(bytes.Repeat([]byte("k"), 24<<10), byte(i))
			_, err := spindle.kv.DeleteRange(callContext(t), &pb.DeleteRangeRequest{Key: key})
			errs <- err
		}()
	}
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

// withoutHeader returns a response without its field 1.
func withoutHeader(msg []byte) (rest []byte) {
	for it := (codec.Fields{Msg: msg}); it.Next(); {
		if it.Field.Num != 1 {
			rest = append(rest, it.Field.Raw...)
		}
	}
	return rest
}

// Bytes that are no message, and methods that do not exist.
func TestBadCalls(t *testing.T) {
	etcd := dial(t, startEtcd(t))
	spindle := dial(t, startSpindle(t, 2, 1, nil)[0].ClientURLs()[0])
	garbage := [][]byte{
		{0xff}, {0x0a}, {0x0a, 0x7f}, {0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f}, {0x0b}, {0x0f, 1, 2, 3, 4},
		bytes.Repeat([]byte{0x80}, 11), {0x1a, 0x03, 0x0a, 0x05, 'k'},
	}
	for _, method := range []string{"KV/Range", "KV/Put", "KV/DeleteRange", "KV/Txn", "KV/Compact", "Lease/LeaseGrant", "Lease/LeaseRevoke",
		"Lease/LeaseTimeToLive", "Lease/LeaseLeases", "Maintenance/Status", "Maintenance/Alarm", "Cluster/MemberList"} {
		for _, body := range garbage {
			method := "/etcdserverpb." + method
			_, want := etcd.invoke(callContext(t), method, body)
			_, got := spindle.invoke(callContext(t), method, body)
			if status.Code(want) != status.Code(got) {
				t.Errorf("%s %x:\netcd:    %v\nspindle: %v", method, body, want, got)
			}
		}
	}
	// A field of a wrong wire type is an unknown field: the revision, the ID and the action are 0.
	wrong := protowire.AppendFixed64(protowire.AppendTag(nil, 1, protowire.Fixed64Type), 1)
	for _, method := range []string{"KV/Range", "KV/Compact", "Lease/LeaseRevoke", "Lease/LeaseTimeToLive", "Lease/LeaseKeepAlive", "Maintenance/Alarm"} {
		method := "/etcdserverpb." + method
		a, want := etcd.invoke(callContext(t), method, wrong)
		b, got := spindle.invoke(callContext(t), method, wrong)
		if errText(want) != errText(got) || !bytes.Equal(withoutHeader(a), withoutHeader(b)) {
			t.Errorf("%s with a field 1 of the wrong type:\netcd:    %v %x\nspindle: %v %x", method, want, a, got, b)
		}
	}
	for _, method := range []string{
		"/etcdserverpb.KV/Frobnicate", "/etcdserverpb.Nothing/Range", "/x/y",
	} {
		_, want := etcd.invoke(callContext(t), method, nil)
		_, got := spindle.invoke(callContext(t), method, nil)
		if a, b := errText(want), errText(got); a != b {
			t.Errorf("%s:\netcd:    %s\nspindle: %s", method, a, b)
		}
	}
	// What is not built yet says so, by its name, and at once.
	for _, method := range []string{
		"/etcdserverpb.Maintenance/Defragment", "/etcdserverpb.Auth/AuthEnable", "/etcdserverpb.Cluster/MemberAdd",
	} {
		_, err := spindle.invoke(callContext(t), method, nil)
		name := method[strings.LastIndexByte(method, '/')+1:]
		if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", method, err)
		}
	}
	if _, err := spindle.kv.Put(callContext(t), &pb.PutRequest{Key: []byte("k"), Value: []byte("v")}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}
