package chaos

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	// shortRun is how long faults come without SPINDLE_CHAOS.
	shortRun = 15 * time.Second
	// calm is how long nothing breaks between two rounds.
	calm = 400 * time.Millisecond
	// recoverTimeout is how long everything may take to go on after the last fault was mended. Generous: the machines
	// are busy, and a connection that is half-open is noticed by its pings.
	recoverTimeout   = 60 * time.Second
	porcupineTimeout = 60 * time.Second
	// tellAfter is how long it may take to go on until the run tells what took long; told is how much of it.
	tellAfter = time.Second
	told      = 8
)

// SPINDLE_CHAOS=5m makes the run longer, and its faults too. SPINDLE_CHAOS_KINDS=cut,half-open leaves all other kinds out.
func TestChaos(t *testing.T) {
	if testing.Short() {
		t.Skip("starts eight processes")
	}
	lasts, longest := shortRun, time.Second
	if v := os.Getenv("SPINDLE_CHAOS"); v != "" {
		var err error
		if lasts, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
		longest = 3 * time.Second
	}
	seed := seedOf(t)
	sys, l := startLoad(t, seed)
	rec := l.rec
	order := &schedule{r: newRand(seed, 0), sys: sys, kinds: slices.Clone(kinds)}
	if !sys.slowDisks() {
		t.Log(errNoSlowDisk)
		order.kinds = slices.DeleteFunc(order.kinds, func(k kind) bool { return k.name == slowDisk })
	}
	if v := os.Getenv("SPINDLE_CHAOS_KINDS"); v != "" {
		only := strings.Split(v, ",")
		order.kinds = slices.DeleteFunc(order.kinds, func(k kind) bool { return !slices.Contains(only, k.name) })
		if len(order.kinds) == 0 {
			t.Fatalf("SPINDLE_CHAOS_KINDS=%q names no kind", v)
		}
	}
	var rounds []*round
	for end := time.Now().Add(lasts); len(rounds) == 0 || time.Now().Before(end); {
		var faults []*fault // none in the first round: what this machine does anyway
		d := 2 * longest
		if len(rounds) > 0 {
			faults, d = order.round(longest)
		}
		rd, err := l.suffer(faults, d)
		if err != nil {
			t.Fatal(err)
		}
		rounds = append(rounds, rd)
		others, own, where := rd.pauses(l)
		t.Logf("%8.3f round %d, for %v: %q; mended after %v, writes went on %v later, watches %v; longest pauses: affected %v, others %v (%s)",
			rd.begun.Seconds(), len(rounds), ms(d), faults, ms(rd.ended-rd.begun), ms(rd.writes), ms(rd.watches), ms(own), ms(others), where)
		if max(rd.writes, rd.watches) > tellAfter {
			t.Logf("what took long: %s", l.slowest(rd))
		}
		if rd.recovered == 0 {
			t.Fatalf("%8.3f: not everything goes on %v after the end of the faults: %s", rec.now().Seconds(), recoverTimeout, l.stuck(rd.ended))
		}
		l.pause(calm)
	}
	if err := l.finish(); err != nil {
		t.Fatal(err)
	}

	v := rec.check()
	for i, w := range v.wrong {
		if i == maxComplaints {
			t.Errorf("and %d more", len(v.wrong)-i)
			break
		}
		t.Error(w)
	}
	result, ops := rec.linearizable(porcupineTimeout)
	if result == porcupine.Illegal {
		t.Error("porcupine: the hot keys are not linearizable")
	}
	t.Logf("checked: %d acknowledged writes (%d of them deletes over all shards), %d with unknown outcome (%d of them happened), %d reads, %d watches, %d events, %d leases; porcupine: %s for %d requests",
		v.acked, v.wide, v.unknown, v.unknownDone, v.reads, v.segments, v.events, v.leases, result, ops)
	t.Logf("%d rounds:\n%s", len(rounds), report(rounds, l))
	for _, e := range rec.oddErrors() {
		t.Error(e)
	}
}

// seedOf returns the seed of this run and tells it.
func seedOf(t *testing.T) uint64 {
	seed := rand.Uint64()
	if v := os.Getenv("SPINDLE_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("SPINDLE_SEED=%q is not a number", v)
		}
	}
	t.Logf("seed: SPINDLE_SEED=%d", seed)
	return seed
}

// startLoad starts a system and its clients, and waits until they are at work.
func startLoad(t *testing.T, seed uint64) (*system, *load) {
	start := time.Now()
	sys := startSystem(t, start)
	l, err := newLoad(sys, newRecord(start), seed)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range l.conn {
		t.Cleanup(func() { c.Close() })
	}
	l.begin()
	if !l.awaitAll(l.rec.now(), recoverTimeout, nil) {
		t.Fatal("the load does not begin")
	}
	return sys, l
}

// suffer runs one round: the faults, and until everything goes on. Without a recovered time it does not.
func (l *load) suffer(faults []*fault, d time.Duration) (*round, error) {
	rd := &round{faults: faults, begun: l.rec.now()}
	for _, f := range faults {
		if err := f.begin(); err != nil {
			return nil, fmt.Errorf("%v: %w", f, err)
		}
	}
	l.pause(d)
	for _, f := range faults {
		if err := f.undo(); err != nil {
			return nil, fmt.Errorf("%v: %w", f, err)
		}
	}
	for _, f := range faults {
		if err := f.await(); err != nil {
			return nil, fmt.Errorf("%v: %w", f, err)
		}
	}
	rd.ended = l.rec.now()
	if l.awaitAll(rd.ended, recoverTimeout, rd) {
		rd.recovered = l.rec.now()
	}
	return rd, nil
}

// awaitAll waits until, after a point in time, every shard was written through every proxy and both watches of everything
// have shown what was written until then.
func (l *load) awaitAll(since, timeout time.Duration, rd *round) bool {
	newest := l.newest.Load()
	written := func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		for p := range proxies {
			for s := range shards {
				if a := l.acks[p][s]; len(a) == 0 || a[len(a)-1] < since {
					return false
				}
			}
		}
		return true
	}
	shown := func() bool {
		return !slices.ContainsFunc([]int{0, 1}, func(p int) bool { return l.position[p].Load() < newest })
	}
	var writes, watches time.Duration
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for range poll.C {
		now := l.rec.now()
		if writes == 0 && written() {
			writes = now - since
		}
		if watches == 0 && shown() {
			watches = now - since
		}
		if rd != nil {
			rd.writes, rd.watches = writes, watches
		}
		if writes > 0 && watches > 0 {
			return true
		}
		if now-since > timeout {
			return false
		}
	}
	return false
}

// slowest says which requests about one shard took longest in a round, and what the proxies said last.
func (l *load) slowest(rd *round) string {
	l.rec.mu.Lock()
	var slow []*request
	for _, q := range l.rec.requests {
		if q.ret > rd.begun && q.ret-q.call > tellAfter/2 && (q.shard >= 0 || strings.HasPrefix(q.what, "get ")) {
			slow = append(slow, q)
		}
	}
	l.rec.mu.Unlock()
	slices.SortFunc(slow, func(a, b *request) int { return int((b.ret - b.call) - (a.ret - a.call)) })
	var b strings.Builder
	for _, q := range slow[:min(told, len(slow))] {
		fmt.Fprintf(&b, "\n%v, shard %d", q, q.shard)
	}
	for _, p := range l.sys.proxies {
		lines := strings.Split(p.log.String(), "\n")
		fmt.Fprintf(&b, "\n%s:\n%s", p.name, strings.Join(lines[max(0, len(lines)-told):], "\n"))
	}
	return b.String()
}

// stuck says which shards were not written, and how far the watches of everything are.
func (l *load) stuck(since time.Duration) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var b strings.Builder
	for p := range proxies {
		for s := range shards {
			if a := l.acks[p][s]; len(a) == 0 || a[len(a)-1] < since {
				fmt.Fprintf(&b, "%s is not written through proxy %d; ", shardNames[s], p)
			}
		}
		fmt.Fprintf(&b, "watch %d is at %d of %d; ", p, l.position[p].Load(), l.newest.Load())
	}
	l.rec.mu.Lock()
	defer l.rec.mu.Unlock()
	for _, q := range l.rec.requests {
		if q.code != 0 && q.ret > since && !strings.Contains(b.String(), q.text) {
			fmt.Fprintf(&b, "\n%v", q)
		}
	}
	return b.String()
}

// finish ends the load, waits until all leases have ended, and looks at everything once more.
func (l *load) finish() error {
	close(l.stop)
	l.clients.Wait()
	// A lease ends when nobody keeps it alive any more, and its keys with it.
	leases := &pb.RangeRequest{Key: []byte(root + "lease/"), RangeEnd: prefixEnd(root + "lease/")}
	deadline := time.Now().Add(recoverTimeout)
	for {
		q, _ := l.listPage(0, leases)
		if len(q.reads) == 1 && q.reads[0].count == 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("keys of leases are still there %v after the last keepalive: %v", recoverTimeout, q)
		}
		l.breathe()
	}
	// The last write of all, after which nothing is under way.
	for err := l.put(0, 0, l.hot[0][0]); err != nil; err = l.put(0, 0, l.hot[0][0]) {
		if time.Now().After(deadline) {
			return err
		}
		l.breathe()
	}
	l.final.Store(l.newest.Load())
	l.watches.Wait()
	everything := func() *pb.RangeRequest { return &pb.RangeRequest{Key: []byte(root), RangeEnd: prefixEnd(root)} }
	for p := range proxies {
		if l.position[p].Load() < l.final.Load() {
			return fmt.Errorf("the watch of everything by proxy %d ended at %d, the last revision is %d", p, l.position[p].Load(), l.final.Load())
		}
		l.listPage(p, everything())
		seg := &segment{key: root, end: string(prefixEnd(root)), start: l.compacted.Load() + 1, prevKV: true}
		if err := l.follow(p, seg, 0, nil, nil); err != nil {
			return fmt.Errorf("the last watch: %w", err)
		}
	}
	return nil
}

// oddErrors returns errors that no fault excuses.
func (r *record) oddErrors() (odd []string) {
	for _, q := range r.requests {
		switch text := q.text; {
		case q.code == 0, strings.Contains(text, "required revision has been compacted"), strings.Contains(text, "requested lease not found"):
		case q.code.String() == "Unavailable", q.code.String() == "DeadlineExceeded":
		default:
			odd = append(odd, q.String())
		}
	}
	return odd
}
