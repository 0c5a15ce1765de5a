package load

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"spindle/bench/client"
	"spindle/codec"
)

// TwoStep is the least that a create through Spindle can take, without Spindle: one client sends a Txn of a tick's form to the
// coordinator's etcd and, when it is answered, one of a batch's form to the member's etcd. Both etcds also feed a watch of
// everything on the same connection, as a proxy's do. Its latency is that of both together.
//
// spec is the load of one client that creates: Endpoints is the member, Processes are measured; clients, watchers and rate are
// not used. The etcds must be empty.
func TwoStep(ctx context.Context, spec Spec, coordinator string) (*Result, error) {
	if spec.Mix.String() != string(Create) {
		return nil, fmt.Errorf("the reference creates, and does not %q", spec.Mix)
	}
	spec.Clients, spec.Connections, spec.Watchers, spec.WatchAll, spec.Rate = 1, 1, 0, false, 0
	if err := spec.Validate(); err != nil {
		return nil, err
	}
	r := newRun(ctx, spec, io.Discard)
	defer r.cancel(nil)
	t := &twoStep{n: r.base.UnixMicro()}
	t.tick.t, t.batch.t, t.first = t, t, t.n
	defer func() {
		r.close()
		if t.coord != nil {
			t.coord.Close()
		}
	}()
	if err := r.dial(); err != nil {
		return nil, err
	}
	t.g = r.groups[0]
	at := spec
	at.Endpoints = []string{coordinator}
	var err error
	if t.coord, err = (&run{spec: at, ctx: r.ctx}).connect(0); err != nil {
		return nil, err
	}
	r.connMu.Lock()
	r.conns = append(r.conns, t.coord)
	r.connMu.Unlock()
	r.watching.begin(2)
	for _, c := range []*client.Conn{t.coord, t.g.conn} {
		(&feed{run: r, conn: c}).open(0, 1, 2, []byte{0}, []byte{0})
	}
	if err := r.awaitWatches(2); err != nil {
		return nil, err
	}
	return r.measure(t.start)
}

// The keys of Spindle's that the two Txns write, and the sizes of what it writes there (docs/formats.md).
var (
	stepTick  = []byte("\x00t")
	stepEpoch = []byte("\x00e")
	stepClock = []byte("\x00clock")
)

const (
	stepTickSize   = 40 // one shard's part, with the filter of one key
	stepRecordSize = 48
	stepStampSize  = 9
)

// twoStep is the one client. A step is guarded by its connection's lock; there is one at a time, so they never wait for
// one another.
type twoStep struct {
	g           *group
	coord       *client.Conn
	tick, batch step
	first, n    int64 // it counts from the present, so that the clock rises from one round to the next
	begun       int64
	key, value  []byte
	msg, rec    []byte
}

// step is one of the two requests.
type step struct {
	t    *twoStep
	good bool
}

// Message implements client.Sink.
func (s *step) Message(m []byte) {
	r, ok := parseTxn(m)
	s.good = ok && r.succeeded
}

// End implements client.Sink.
func (s *step) End(st codec.Status) {
	t := s.t
	if st.Code != codec.OK || !s.good {
		if !t.g.run.stopped.Load() {
			t.g.run.abort("a Txn of the reference failed: %v", st)
		}
		return
	}
	s.good = false
	if s == &t.tick {
		t.sendBatch()
		return
	}
	t.g.stat(kindCreate).lat.Record(t.g.run.now() - t.begun)
	t.n++
	t.start()
}

// start begins the next create.
func (t *twoStep) start() {
	if t.g.run.stopped.Load() {
		return
	}
	t.begun = t.g.run.now()
	t.rec = append(t.rec[:0], make([]byte, stepTickSize)...)
	binary.BigEndian.PutUint64(t.rec, uint64(t.n))
	// The guard by the epoch, and inside, both branches put the tick: as revclock's.
	m := appendGuard(t.msg[:0], stepEpoch, 0)
	m, op := codec.BeginMessage(m, txnSuccess)
	m, txn := codec.BeginMessage(m, opTxn)
	m = appendGuard(m, stepTick, t.n)
	m = appendPutOp(m, stepTick, t.rec, 0)
	m = appendElsePut(m, stepTick, t.rec)
	m = codec.EndMessage(m, txn)
	t.msg = appendElseRange(codec.EndMessage(m, op), stepEpoch)
	t.call(t.coord, &t.tick)
}

// sendBatch sends the create as the only one of its batch.
func (t *twoStep) sendBatch() {
	g := t.g
	t.key = g.run.keys.fresh(t.key, "pods", 0, t.n-t.first)
	stampValue(g.value, t.begun)
	t.value = append(append(t.value[:0], make([]byte, stepStampSize)...), g.value...)
	t.rec = append(t.rec[:0], make([]byte, stepRecordSize)...)
	binary.BigEndian.PutUint64(t.rec, uint64(t.n))
	m := t.msg[:0]
	if t.n > t.first {
		m = appendGuardValue(m, stepClock, valueLess, t.rec[:8])
		binary.BigEndian.PutUint64(t.rec, uint64(t.n-1))
		m = appendGuardValue(m, stepClock, valueGreater, t.rec[:8])
		binary.BigEndian.PutUint64(t.rec, uint64(t.n))
	}
	m = appendGuard(m, stepEpoch, 0)
	m, op := codec.BeginMessage(m, txnSuccess)
	m, txn := codec.BeginMessage(m, opTxn)
	m = appendCreate(m, t.key, t.value, 0)
	m = codec.EndMessage(m, txn)
	m = codec.EndMessage(m, op)
	m = appendPutOp(m, stepClock, t.rec, 0)
	t.msg = appendElseRange(m, stepClock)
	t.call(g.conn, &t.batch)
}

// call sends t.msg. It is called from within the other step's End, whose connection is locked, or from outside.
func (t *twoStep) call(c *client.Conn, s *step) {
	c.Lock()
	defer c.Unlock()
	if !c.Call(pathTxn, t.msg, s) {
		t.g.lost()
	}
}

const (
	opTxn        = 4
	compareValue = 3
	valueGreater = 1
	valueLess    = 2
)

// appendGuardValue appends VALUE(key) < or > value.
func appendGuardValue(m, key []byte, result int64, value []byte) []byte {
	m, mark := codec.BeginMessage(m, txnCompare)
	m = codec.AppendInt(m, 1, result)
	m = codec.AppendInt(m, 2, compareValue)
	m = codec.AppendBytes(m, 3, key)
	m = codec.AppendBytes(m, 7, value)
	return codec.EndMessage(m, mark)
}

func appendElsePut(m, key, value []byte) []byte {
	m, op := codec.BeginMessage(m, txnFailure)
	m, put := codec.BeginMessage(m, opPut)
	m = codec.AppendBytes(m, 1, key)
	m = codec.AppendBytes(m, 2, value)
	m = codec.EndMessage(m, put)
	return codec.EndMessage(m, op)
}
