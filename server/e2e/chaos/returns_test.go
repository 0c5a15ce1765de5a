package chaos

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	// returnRounds is how often a shard is away in TestShardReturns, awayFor how long: until its connections are dialed
	// with the longest pauses.
	returnRounds = 3
	awayFor      = 1500 * time.Millisecond
	// backWithin is how long after a shard answers by itself everything flows again: in half of the rounds when it is measured, else in one
	// of them at least. backAtLast is what a machine that is busy may make of it.
	backWithin, backAtLast = time.Second, 15 * time.Second
	// dialsAway is how many connections a proxy may ask each node for meanwhile: 50 ms and its doubles up to 500 ms stand
	// between them, or half of that, which is dialPause in the end.
	dialsAway = 12
	dialPause = 250 * time.Millisecond
)

// answers returns when a node has answered a linearizable read by itself.
func (m *member) answers(l *load) (time.Duration, error) {
	m.mu.Lock()
	addr := m.client
	m.mu.Unlock()
	conn, err := dial(addr)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), serveTimeout)
	defer cancel()
	if _, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(root)}); err != nil {
		return 0, fmt.Errorf("%s: %w", m.spec.Name, err)
	}
	return l.rec.now(), nil
}

// A shard that was away is written to within a second of when it answers by itself, and the watches of everything show it:
// what etcd needs for its start is not counted. Nobody storms it meanwhile.
func TestShardReturns(t *testing.T) {
	if testing.Short() {
		t.Skip("starts eight processes")
	}
	rounds, measure := returnRounds, os.Getenv("SPINDLE_CHAOS_MEASURE") != ""
	if measure {
		rounds *= 6
	}
	seed := seedOf(t)
	sys, l := startLoad(t, seed)
	r := newRand(seed, 0)
	var writes, watches []time.Duration
	for n := range rounds {
		place := r.IntN(shards)
		nodes := sys.nodes(place)
		f := membersKilled(shardNames[place], nodes, onShard(place), false)
		gone := l.rec.now()
		if err := f.begin(); err != nil {
			t.Fatal(err)
		}
		var dials [proxies]int64
		count := func(sign int64) {
			for p := range proxies {
				for _, m := range nodes {
					dials[p] += sign * m.in[p].dials.Load()
				}
			}
		}
		count(-1)
		l.pause(awayFor)
		count(1)
		begun := l.rec.now()
		late := int64((begun - gone - awayFor) / dialPause) // a busy machine gives everybody more time
		if err := f.undo(); err != nil {
			t.Fatal(err)
		}
		if err := f.await(); err != nil {
			t.Fatal(err)
		}
		by, err := nodes[0].answers(l)
		if err != nil {
			t.Fatal(err)
		}
		rd := &round{}
		if !l.awaitAll(by, recoverTimeout, rd) {
			t.Fatalf("not everything goes on: %s", l.stuck(by))
		}
		writes, watches = append(writes, rd.writes), append(watches, rd.watches)
		t.Logf("round %d, %s: answers %v after its start; written %v, watched %v after that; dialed %v times in %v",
			n+1, shardNames[place], ms(by-begun), ms(rd.writes), ms(rd.watches), dials, awayFor)
		for p, d := range dials {
			if most := (dialsAway + late) * int64(len(nodes)); d > most {
				t.Errorf("proxy %d asked %s for %d connections in %v", p, shardNames[place], d, awayFor)
			}
		}
		l.pause(calm)
	}
	if err := l.finish(); err != nil {
		t.Fatal(err)
	}
	for what, d := range map[string][]time.Duration{"writes": writes, "watches": watches} {
		slices.Sort(d)
		t.Logf("%s: %v to %v, median %v", what, ms(d[0]), ms(d[len(d)-1]), ms(d[len(d)/2]))
		usual := d[0]
		if measure {
			usual = d[len(d)/2]
		}
		if usual > backWithin || d[len(d)-1] > backAtLast {
			t.Errorf("%s went on %v after a shard was back", what, d)
		}
	}
	for _, w := range l.rec.check().wrong {
		t.Error(w)
	}
}
