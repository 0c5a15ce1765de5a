package sim

import (
	"errors"
	"fmt"
	"slices"
	"sort"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// Limits of a modelled cluster, as etcd's flags set them (etcd's defaults are 128 and 1.5 MiB).
const (
	defaultMaxTxnOps       = 1024
	defaultMaxRequestBytes = 1536*1024 + 64*1024
)

// Change is one change of one key, as it lies in the history of a modelled cluster.
type Change struct {
	Main, Sub int64
	Delete    bool
	KV        *mvccpb.KeyValue // of a delete: key and mod revision only
	At        int64            // virtual ns, where there is a clock
	Seq       int64            // the world's event in which it happened, as op.call
}

// Etcd is a modelled etcd cluster: one key space with its whole history. Requests come in and answers go
// out as encoded messages. It belongs to one goroutine, and an answer is computed at once: when a request
// arrives and how long its answer takes is the network's affair.
type Etcd struct {
	ClusterID, MemberID, Term uint64

	MaxTxnOps       int
	MaxRequestBytes int
	Version         string

	// Broken is set when a request came that makes an etcd panic. Every answer after that is Unavailable.
	Broken error
	// AutoLease, if set, gives the lease that a put of this key is attached to although the put names
	// none, as if the cluster's clients had: keys that may expire must carry a lease.
	AutoLease func(key []byte) int64
	// Now and After are the clock by which leases expire; without them none does. OnExpire is told of each.
	Now      func() int64
	Event    func() int64
	After    func(time.Duration, func())
	OnExpire func(id int64)
	// OnChange is called after every change of the revision.
	OnChange func()

	rev     int64
	compact int64
	sub     int64 // of the next change within the revision that is being written
	keys    []string
	hist    map[string][]*Change
	log     []*Change // everything that ever happened, kept also behind a compaction
	leases  map[int64]*lease

	nextLease int64
}

// NewEtcd makes an empty cluster at revision 1.
func NewEtcd(clusterID uint64) *Etcd {
	return &Etcd{
		ClusterID: clusterID, MemberID: clusterID + 1, Term: 2,
		MaxTxnOps: defaultMaxTxnOps, MaxRequestBytes: defaultMaxRequestBytes, Version: "3.6.0",
		rev: 1, compact: -1,
		hist:   map[string][]*Change{},
		leases: map[int64]*lease{},
	}
}

// Rev returns the current revision, Compacted the compact revision (-1 for none).
func (e *Etcd) Rev() int64 { return e.rev }

// Compacted returns the revision of the last compaction, -1 if there was none.
func (e *Etcd) Compacted() int64 { return e.compact }

// Log returns the whole history, oldest first. The caller must not change it.
func (e *Etcd) Log() []*Change { return e.log }

var (
	errTooManyOps = codec.ErrTooManyOps
	errBadMessage = codec.Status{Code: codec.Internal, Msg: "grpc: error unmarshalling request"}
)

// Serve answers one unary request.
func (e *Etcd) Serve(m codec.Method, req []byte) ([]byte, codec.Status) {
	if e.Broken != nil {
		return nil, codec.Status{Code: codec.Unavailable, Msg: "simulated: " + e.Broken.Error()}
	}
	switch m {
	case codec.MethodRange:
		r := &pb.RangeRequest{}
		return serve(req, r, func() (*pb.RangeResponse, codec.Status) { return e.Range(r) })
	case codec.MethodTxn:
		r := &pb.TxnRequest{}
		return serve(req, r, func() (*pb.TxnResponse, codec.Status) {
			if len(req) > e.MaxRequestBytes && !readOnly(r) {
				return nil, codec.ErrRequestTooLarge
			}
			return e.Txn(r)
		})
	case codec.MethodCompact:
		r := &pb.CompactionRequest{}
		return serve(req, r, func() (*pb.CompactionResponse, codec.Status) { return e.Compact(r) })
	case codec.MethodStatus:
		return serve(req, &pb.StatusRequest{}, func() (*pb.StatusResponse, codec.Status) {
			return &pb.StatusResponse{
				Header: e.header(e.rev), Version: e.Version, Leader: e.MemberID, RaftIndex: uint64(e.rev), RaftTerm: e.Term,
				RaftAppliedIndex: uint64(e.rev), DbSize: 1 << 20, DbSizeInUse: 1 << 19, DbSizeQuota: 2 << 30, StorageVersion: "3.6.0",
			}, codec.Status{}
		})
	case codec.MethodAlarm:
		return serve(req, &pb.AlarmRequest{}, func() (*pb.AlarmResponse, codec.Status) {
			return &pb.AlarmResponse{Header: e.header(e.rev)}, codec.Status{}
		})
	case codec.MethodMemberList:
		return serve(req, &pb.MemberListRequest{}, func() (*pb.MemberListResponse, codec.Status) {
			return &pb.MemberListResponse{
				Header:  e.header(e.rev),
				Members: []*pb.Member{{ID: e.MemberID, Name: "m", ClientURLs: []string{"http://m:2379"}, PeerURLs: []string{"http://m:2380"}}},
			}, codec.Status{}
		})
	}
	return e.serveLease(m, req)
}

// serve decodes req into r, answers, and encodes the answer.
func serve[Resp proto.Message](req []byte, r proto.Message, answer func() (Resp, codec.Status)) ([]byte, codec.Status) {
	if proto.Unmarshal(req, r) != nil {
		return nil, errBadMessage
	}
	resp, st := answer()
	if st.Code != codec.OK {
		return nil, st
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(resp)
	if err != nil {
		return nil, codec.Status{Code: codec.Internal, Msg: err.Error()}
	}
	return b, codec.Status{}
}

func (e *Etcd) header(rev int64) *pb.ResponseHeader {
	return &pb.ResponseHeader{ClusterId: e.ClusterID, MemberId: e.MemberID, Revision: rev, RaftTerm: e.Term}
}

// fill completes the header of a top-level answer.
func (e *Etcd) fill(h *pb.ResponseHeader) {
	rev := h.Revision
	if rev == 0 {
		rev = e.rev
	}
	proto.Reset(h)
	proto.Merge(h, e.header(rev))
}

// Range answers a range request on its own.
func (e *Etcd) Range(r *pb.RangeRequest) (*pb.RangeResponse, codec.Status) {
	if st := checkRangeRequest(r); st.Code != codec.OK {
		return nil, st
	}
	resp, st := e.rangeAt(e.rev, r)
	if st.Code == codec.OK {
		e.fill(resp.Header)
	}
	return resp, st
}

// Compact forgets what lies behind r.Revision, for requests; Log keeps it.
func (e *Etcd) Compact(r *pb.CompactionRequest) (*pb.CompactionResponse, codec.Status) {
	if r.Revision <= e.compact {
		return nil, codec.ErrCompacted
	}
	if r.Revision > e.rev {
		return nil, codec.ErrFutureRev
	}
	e.compact = r.Revision
	return &pb.CompactionResponse{Header: e.header(e.rev)}, codec.Status{}
}

// Put answers a put request on its own (proxies send none; the tests and foreign writers do).
func (e *Etcd) Put(r *pb.PutRequest) (*pb.PutResponse, codec.Status) {
	resp, st := e.Txn(&pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: r}}}})
	if st.Code != codec.OK {
		return nil, st
	}
	p := resp.Responses[0].GetResponsePut()
	e.fill(p.Header)
	return p, st
}

// Expire deletes those of keys that exist, all in one revision, as the end of a lease does.
func (e *Etcd) Expire(keys ...string) {
	e.begin()
	for _, k := range keys {
		e.deleteRange([]byte(k), nil)
	}
	e.end()
}

// begin and end bracket the changes of one revision.
func (e *Etcd) begin() { e.sub = 0 }

func (e *Etcd) end() {
	if e.sub == 0 {
		return
	}
	e.rev++
	e.sub = 0
	if e.OnChange != nil {
		e.OnChange()
	}
}

// view returns the revision at which reads inside the running write see the store.
func (e *Etcd) view() int64 {
	if e.sub > 0 {
		return e.rev + 1
	}
	return e.rev
}

// at returns what key holds at rev: nil if it does not exist then.
func (e *Etcd) at(key []byte, rev int64) *Change {
	h := e.hist[string(key)]
	for i := len(h) - 1; i >= 0; i-- {
		if h[i].Main <= rev {
			if h[i].Delete {
				return nil
			}
			return h[i]
		}
	}
	return nil
}

// span returns the names in [key, end) that ever existed: end nil is the one key, end "\0" is no end.
func (e *Etcd) span(key, end []byte) []string {
	i := sort.SearchStrings(e.keys, string(key))
	if len(end) == 0 {
		if i < len(e.keys) && e.keys[i] == string(key) {
			return e.keys[i : i+1]
		}
		return nil
	}
	j := len(e.keys)
	if !(len(end) == 1 && end[0] == 0) {
		j = sort.SearchStrings(e.keys, string(end))
	}
	if j <= i {
		return nil
	}
	return e.keys[i:j]
}

// existing returns the pairs of [key, end) at rev, in order of key.
func (e *Etcd) existing(key, end []byte, rev int64) []*mvccpb.KeyValue {
	var kvs []*mvccpb.KeyValue
	for _, k := range e.span(key, end) {
		if c := e.at([]byte(k), rev); c != nil {
			kvs = append(kvs, c.KV)
		}
	}
	return kvs
}

func (e *Etcd) add(c *Change) {
	if e.Now != nil {
		c.At, c.Seq = e.Now(), e.Event()
	}
	key := string(c.KV.Key)
	if _, ok := e.hist[key]; !ok {
		i := sort.SearchStrings(e.keys, key)
		e.keys = slices.Insert(e.keys, i, key)
	}
	e.hist[key] = append(e.hist[key], c)
	e.log = append(e.log, c)
	e.sub++
}

func (e *Etcd) put(key, value []byte, lease int64) {
	main := e.rev + 1
	if lease == 0 && e.AutoLease != nil {
		lease = e.AutoLease(key)
	}
	kv := &mvccpb.KeyValue{Key: slices.Clone(key), Value: slices.Clone(value), Lease: lease, ModRevision: main, CreateRevision: main, Version: 1}
	if old := e.at(key, main); old != nil {
		kv.CreateRevision = old.KV.CreateRevision
		kv.Version = old.KV.Version + 1
	}
	e.add(&Change{Main: main, Sub: e.sub, KV: kv})
}

func (e *Etcd) deleteRange(key, end []byte) int64 {
	kvs := e.existing(key, end, e.view())
	for _, kv := range kvs {
		e.add(&Change{Main: e.rev + 1, Sub: e.sub, Delete: true, KV: &mvccpb.KeyValue{Key: kv.Key, ModRevision: e.rev + 1}})
	}
	return int64(len(kvs))
}

func (e *Etcd) breaks(format string, args ...any) {
	if e.Broken == nil {
		e.Broken = fmt.Errorf(format, args...)
	}
}

var errPanics = errors.New("this request makes etcd panic")
