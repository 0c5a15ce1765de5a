package sim

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// TestStartReadsFewKeys: a start asks no member that has its identity for anything that makes it read all keys, as a compare
// of them does. It held every member up at every start of a proxy, and one with a gigabyte for longer than a
// proxy waits for an answer, so that none could start any more.
func TestStartReadsFewKeys(t *testing.T) {
	w := smallWorld(t, 1, 1<<10)
	p := w.proxies[0]
	w.put(p, "k00")
	p.crash()
	asked := 0
	w.net.Tamper = func(to codec.ClusterID, m codec.Method, req []byte) []byte {
		wide := func(key, end []byte) bool {
			return string(end) == "\x00" && (len(key) == 0 || key[0] == 0)
		}
		asked++
		switch q, txn := (&pb.RangeRequest{}), (&pb.TxnRequest{}); {
		case to < 0:
		case m == codec.MethodRange && proto.Unmarshal(req, q) == nil && wide(q.Key, q.RangeEnd):
			t.Errorf("asked of a member: %v", q)
		case m == codec.MethodTxn && proto.Unmarshal(req, txn) == nil:
			for _, c := range txn.Compare {
				if wide(c.Key, c.RangeEnd) {
					t.Errorf("asked of a member: %v", txn)
				}
			}
			for _, o := range append(txn.Success, txn.Failure...) {
				if q := o.GetRequestRange(); q != nil && wide(q.Key, q.RangeEnd) {
					t.Errorf("asked of a member: %v", txn)
				}
			}
		}
		return req
	}
	p.boot(0)
	w.wait("the start", func() bool { return p.ready })
	if asked == 0 {
		t.Error("nothing was asked")
	}
}
