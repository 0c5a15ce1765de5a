package chaos

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	// returnRounds is how often a shard is away in TestShardReturns, and moreRounds how often at most, where not most of them were quick;
	// awayFor is how long: until its connections are dialed with the longest pauses.
	returnRounds, moreRounds = 3, 5
	awayFor                  = 1500 * time.Millisecond
	// backWithin is how long after a shard answers by itself everything flows again in most rounds, backAtLast in each of them. What a
	// read of another shard took by itself meanwhile comes on top of both.
	backWithin, backAtLast = time.Second, 3 * shardTimeout
	// dialsAway is how many connections a proxy may ask each node for meanwhile: 50 ms and its doubles up to 500 ms stand
	// between them, or half of that, which is dialPause in the end.
	dialsAway = 12
	dialPause = 250 * time.Millisecond
	// controlPause is the pause between two reads of a control.
	controlPause = 10 * time.Millisecond
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

// control reads from a node by itself, again and again, until it is called: what the machine makes everybody wait for. It returns
// what the slowest read took.
func (m *member) control(l *load) func() (time.Duration, error) {
	stop := make(chan struct{})
	var most time.Duration
	var err error
	var reads sync.WaitGroup
	reads.Go(func() {
		for err == nil {
			begun, ended := l.rec.now(), time.Duration(0)
			ended, err = m.answers(l)
			most = max(most, ended-begun)
			select {
			case <-stop:
				return
			default:
				l.pause(controlPause)
			}
		}
	})
	return func() (time.Duration, error) {
		close(stop)
		reads.Wait()
		return most, err
	}
}

// A shard that was away is written to within a second of when it answers by itself, and the watches of everything show it:
// what etcd needs for its start is not counted. Nobody storms it meanwhile.
func TestShardReturns(t *testing.T) {
	if testing.Short() {
		t.Skip("starts eight processes")
	}
	rounds, more := returnRounds, moreRounds
	if os.Getenv("SPINDLE_CHAOS_MEASURE") != "" {
		rounds, more = 6*returnRounds, 6*returnRounds
	}
	seed := seedOf(t)
	sys, l := startLoad(t, seed)
	r := newRand(seed, 0)
	var writes, watches []time.Duration
	quick := 0
	for n := 0; n < rounds || 2*quick <= n && n < more; n++ {
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
		rd, control := &round{}, sys.nodes((place + 1) % shards)[0].control(l)
		if !l.awaitAll(by, recoverTimeout, rd) {
			t.Fatalf("not everything goes on: %s", l.stuck(by))
		}
		waited, err := control()
		if err != nil {
			t.Fatal(err)
		}
		took := max(rd.writes, rd.watches)
		if took <= backWithin+waited {
			quick++
		}
		if took > backAtLast+waited {
			t.Errorf("everything went on %v after %s was back, a read of another shard took %v", took, shardNames[place], waited)
		}
		writes, watches = append(writes, rd.writes), append(watches, rd.watches)
		t.Logf("round %d, %s: answers %v after its start; written %v, watched %v after that, a read of another shard took %v; dialed %v times in %v",
			n+1, shardNames[place], ms(by-begun), ms(rd.writes), ms(rd.watches), ms(waited), dials, awayFor)
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
	}
	if n := len(writes); 2*quick <= n {
		t.Errorf("everything went on within %v in %d rounds of %d: writes %v, watches %v", backWithin, quick, n, writes, watches)
	}
	for _, w := range l.rec.check().wrong {
		t.Error(w)
	}
}
