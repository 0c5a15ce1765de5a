package sim

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"time"

	"spindle/codec"
)

// Net is the simulated world: virtual time, a queue of what will happen, and the clusters. One goroutine
// runs it.
type Net struct {
	Rand    *rand.Rand
	Members []*Cluster
	Coord   *Cluster
	Faults  Faults

	// Tamper and TamperReply, if set, may change a request or an answer on its way.
	Tamper      func(to codec.ClusterID, m codec.Method, req []byte) []byte
	TamperReply func(from codec.ClusterID, m codec.Method, req, resp []byte) []byte
	// Sent, if set, is told of every request that leaves a host.
	Sent func(h *Host, to codec.ClusterID, m codec.Method, req []byte)
	// Trace, if set, is given one line for everything that happens.
	Trace func(line string)

	now    int64
	seq    uint64
	queue  eventQueue
	events uint64 // events that happened

	unrecorded []int64 // when a compaction's record was refused
}

// Faults are the chances, per request, of what can go wrong with it; Calm has none.
type Faults struct {
	LoseRequest float64 // it never arrives
	LoseReply   float64 // it is applied, nobody hears of it
	Late        float64 // the caller hears that it failed, and then it arrives
	Refused     float64 // "too many requests": certainly not applied
	NoLeader    float64 // an answer that says nothing about whether it was, or will be, applied
	Unsent      float64 // no connection: certainly not applied
	SlowReply   float64 // the reply takes long
	SlowRequest float64 // the request takes long
	Duplicate   float64 // it arrives a second time, later
}

// MaxLate is how long after its failure was reported a request may still arrive.
const MaxLate = 8 * time.Second

type event struct {
	at  int64
	seq uint64
	f   func()
}

type eventQueue []event

func (q eventQueue) Len() int { return len(q) }
func (q eventQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q eventQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *eventQueue) Push(x any)   { *q = append(*q, x.(event)) }
func (q *eventQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1] = event{}
	*q = old[:len(old)-1]
	return e
}

// NewNet makes a world of n empty member clusters and a coordinator.
func NewNet(r *rand.Rand, n int) *Net {
	w := &Net{Rand: r, now: int64(time.Hour)}
	for i := range n {
		w.Members = append(w.Members, newCluster(w, codec.ClusterID(i), 0x1000+uint64(i)*16))
	}
	w.Coord = newCluster(w, codec.Coordinator, 0xc000)
	return w
}

// Now returns the virtual time in nanoseconds.
func (w *Net) Now() int64 { return w.now }

// Event returns the number of the event that happens now. Unlike virtual time it tells what came first.
func (w *Net) Event() int64 { return int64(w.events) }

// After calls f once d has passed.
func (w *Net) After(d time.Duration, f func()) { w.at(w.now+int64(max(d, 0)), f) }

func (w *Net) at(t int64, f func()) {
	w.seq++
	heap.Push(&w.queue, event{max(t, w.now), w.seq, f})
}

// Step lets the next event happen; false when there is none before until.
func (w *Net) Step(until int64) bool {
	if len(w.queue) == 0 || w.queue[0].at > until {
		w.now = max(w.now, until)
		return false
	}
	e := heap.Pop(&w.queue).(event)
	w.now = e.at
	w.events++
	e.f()
	return true
}

func (w *Net) tracef(format string, args ...any) {
	if w.Trace != nil {
		w.Trace(fmt.Sprintf("%11.3fms  ", float64(w.now-int64(time.Hour))/1e6) + fmt.Sprintf(format, args...))
	}
}

// Chance is true with probability p.
func (w *Net) Chance(p float64) bool { return p > 0 && w.Rand.Float64() < p }

// Between returns a random duration in [a, b).
func (w *Net) Between(a, b time.Duration) time.Duration {
	if b <= a {
		return a
	}
	return a + time.Duration(w.Rand.Int64N(int64(b-a)))
}

// cluster returns the cluster that a transport means by id.
func (w *Net) cluster(id codec.ClusterID) *Cluster {
	if id == codec.Coordinator {
		return w.Coord
	}
	return w.Members[id]
}

// Cluster is a modelled cluster as it stands in the network.
type Cluster struct {
	*Etcd
	ID codec.ClusterID

	net     *Net
	paused  bool // no quorum: what arrives waits
	full    bool // out of space
	waiting []func()
	streams []*stream
	links   []*Link // of all hosts that ever were
	process int     // counts replacements, see restore.go
	newest  *Etcd   // what was there before an older state was restored, nil if none was
}

func newCluster(w *Net, id codec.ClusterID, clusterID uint64) *Cluster {
	c := &Cluster{Etcd: NewEtcd(clusterID), ID: id, net: w}
	c.OnChange = c.changed
	c.clock()
	return c
}

func (c *Cluster) String() string {
	if c.ID == codec.Coordinator {
		return "coord"
	}
	return fmt.Sprintf("shard%d", c.ID)
}

// clock lets leases expire by the clock of the world, while the cluster has a quorum.
func (c *Cluster) clock() {
	c.Now, c.Event = c.net.Now, c.net.Event
	c.After = func(d time.Duration, f func()) {
		c.net.After(d, func() { c.arrive(f) })
	}
}

// Pause stops the cluster: requests that arrive wait, and are applied, in some order, by Resume.
func (c *Cluster) Pause() { c.paused = true }

// Resume ends Pause.
func (c *Cluster) Resume() {
	c.paused = false
	q := c.waiting
	c.waiting = nil
	c.net.Rand.Shuffle(len(q), func(i, j int) { q[i], q[j] = q[j], q[i] })
	for _, f := range q {
		f()
	}
}

// Wipe makes the cluster a new, empty one, as a coordinator on tmpfs that lost its nodes. Its streams
// end, requests on the way arrive at the new one.
func (c *Cluster) Wipe(clusterID uint64) {
	old := c.Etcd
	c.Etcd = NewEtcd(clusterID)
	c.MaxTxnOps, c.MaxRequestBytes = old.MaxTxnOps, old.MaxRequestBytes
	c.OnChange = c.changed
	c.clock()
	for _, s := range append([]*stream(nil), c.streams...) {
		s.fail(codec.Status{Code: codec.Unavailable, Msg: "simulated: cluster is gone"})
	}
}

func (c *Cluster) arrive(f func()) {
	if c.paused {
		c.waiting = append(c.waiting, f)
		return
	}
	f()
}

func (c *Cluster) changed() {
	for _, s := range c.streams {
		s.schedulePump()
	}
}

// readErrors are what a cluster in trouble answers; they say nothing about whether a request was or will
// be applied.
var troubleAnswers = []codec.Status{
	{Code: codec.Unavailable, Msg: "etcdserver: no leader"},
	{Code: codec.Unavailable, Msg: "etcdserver: leader changed"},
	{Code: codec.Unavailable, Msg: "etcdserver: request timed out"},
	{Code: codec.Unavailable, Msg: "etcdserver: request timed out, possibly due to previous leader failure"},
	{Code: codec.ResourceExhausted, Msg: "etcdserver: mvcc: database space exceeded"},
	{Code: codec.Unknown, Msg: "unexpected EOF"},
}
