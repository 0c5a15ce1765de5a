package chaos

import (
	"fmt"
	"hash/fnv"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
)

// write is one change that a request asks for. Values are never written twice, so a value names its request.
type write struct {
	key   string
	value string // of a put
	lease int64  // of a put
	del   bool
	// prevMod is, of a delete, the revision of what it deletes: its request compares with it.
	prevMod int64
}

// read is what a range showed.
type read struct {
	key, end  string
	at        int64 // the revision that was asked for; 0: none
	limit     int64
	countOnly bool
	count     int64
	more      bool
	mods      []int64 // mod revisions of the keys shown
	sum       uint64  // over all of them
}

// request is one request of a client, and its answer. Times are since the start of the record.
type request struct {
	proxy     int
	shard     int // of a writer's request: the shard that it is about; -1: all others
	what      string
	call, ret time.Duration
	code      codes.Code // OK: answered
	text      string     // of an error
	rev       int64      // the answer's header
	// writes is what it changes, all at once, if it takes effect. acked says that the answer said so; an answer that
	// says that it did not is OK without acked.
	writes []write
	acked  bool
	reads  []read
	// stale marks what need not be linearizable (serializable reads).
	stale bool
	// wide is of a DeleteRange over several shards, which has no writes then.
	wide *wideDelete
	// swap is what the request means to one key, for porcupine; nil for all others.
	swap *swap
}

func (q *request) String() string {
	writes := q.writes
	if q.wide != nil {
		writes = q.wide.deleted
	}
	return fmt.Sprintf("%s by proxy %d from %.3f to %.3f: %v %s, revision %d, acked %v, writes %v",
		q.what, q.proxy, q.call.Seconds(), q.ret.Seconds(), q.code, q.text, q.rev, q.acked, writes)
}

// definite says that the error means that nothing was written, and never will be.
func (q *request) definite() bool {
	switch q.code {
	case codes.NotFound, codes.OutOfRange, codes.InvalidArgument, codes.FailedPrecondition, codes.ResourceExhausted:
		return true
	}
	return false
}

// seen is an event as a watch has shown it.
type seen struct {
	rev  int64
	sum  uint64
	prev int64 // mod revision of prev_kv; 0: none shown
}

// segment is what one watch has shown: everything in [key, end) from start up to upto.
type segment struct {
	who         string
	key, end    string
	start, upto int64
	prevKV      bool
	seen        []seen
}

// event is an event of the history.
type event struct {
	rev     int64
	key     string
	value   string
	del     bool
	create  int64
	version int64
	lease   int64
	prev    int64 // mod revision of prev_kv; 0: none shown
	sum     uint64
	heard   time.Duration // when the watch brought it
}

// shown is a revision that a client knew of at a time.
type shown struct {
	at  time.Duration
	rev int64
}

// leaseLife is what clients know of a lease.
type leaseLife struct {
	id int64
	// alive is until when it may not expire: the last keepalive (or grant) that was answered, from when it was sent on.
	alive time.Duration
	// revoked is when a revoke was asked for, ended when one was answered; 0: never.
	revoked, ended time.Duration
	endedRev       int64 // the header of that answer
}

// record is all that clients have seen. Any goroutine may add to it.
type record struct {
	mu       sync.Mutex
	start    time.Time
	shardOf  func(key string) int
	requests []*request
	segments []*segment
	shown    []shown  // by watches
	history  []*event // of the watch that has everything from revision 1 on
	leases   map[int64]*leaseLife
	// compacted is the highest revision for which a compaction was asked.
	compacted int64
	wrong     []string // what was wrong when it was met
}

func newRecord(start time.Time) *record { return &record{start: start, leases: map[int64]*leaseLife{}} }

func (r *record) now() time.Duration { return time.Since(r.start) }

func (r *record) add(q *request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = append(r.requests, q)
}

func (r *record) complain(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wrong = append(r.wrong, fmt.Sprintf("%.3f: ", r.now().Seconds())+fmt.Sprintf(format, args...))
}

// sumOf is a hash of everything that a client sees of a key.
func sumOf(key, value string, create, mod, version, lease int64) uint64 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s\x00%s\x00%d %d %d %d", key, value, create, mod, version, lease)
	return h.Sum64()
}

func sumOfKV(kv *mvccpb.KeyValue) uint64 {
	return sumOf(string(kv.Key), string(kv.Value), kv.CreateRevision, kv.ModRevision, kv.Version, kv.Lease)
}

// sumOfEvent is the hash of a put's key or of a delete.
func sumOfEvent(e *mvccpb.Event) uint64 {
	if e.Type == mvccpb.Event_DELETE {
		return sumOf(string(e.Kv.Key), "", 0, e.Kv.ModRevision, 0, 0)
	}
	return sumOfKV(e.Kv)
}

// within says whether a key lies in [from, end), or is from if there is no end.
func within(key, from, end string) bool {
	if end == "" {
		return key == from
	}
	return key >= from && key < end
}
