package e2e

import (
	"context"
	"fmt"
	"hash/maphash"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// What the soak does at once. SPINDLE_SOAK (a duration, see `make soak`) says how long.
const (
	soakDefault  = 10 * time.Second
	soakShort    = 4 * time.Second // with -short and under the race detector
	soakShards   = 3
	soakWriters  = 12
	soakReaders  = 4
	soakWatchers = 24
	soakKeys     = 400
	soakRate     = 1200 // writes per second at most: the history of a run of an hour must fit into memory
	soakPrefix   = "soak/"

	// The first proxy keeps few revisions in memory, so that watchers fall out of its ring all the time.
	soakSmallRing = 2048

	soakCompactEvery = 2 * time.Second
	soakSampleEvery  = 500 * time.Millisecond
	// soakMaxRSS fails the run: ring (256 MiB at most) and answers under way do not explain more.
	soakMaxRSS = 1 << 30
)

// soakRingIsHistory: a watch that needs what is not in memory any more may be canceled as compacted though it is not.
// To be set to false when watches read the shards' history.
const soakRingIsHistory = false

// soak is one run: what is shared between its writers, readers and watchers.
type soak struct {
	t     *testing.T
	ctx   context.Context
	conns []*rpc     // several to each proxy
	keys  []string   // sorted
	alike [][]string // the keys by shard
	hash  maphash.Seed

	stop   chan struct{} // closed when the load ends
	tokens chan struct{} // one for each write
	errs   chan error    // holds the first

	newest    atomic.Int64 // largest revision that was acknowledged or shown
	compacted atomic.Int64 // largest revision that was asked to be compacted
	final     atomic.Int64 // the last revision, once the load has ended

	mu       sync.Mutex
	acks     []soakAck
	reads    []soakRead
	segments []*soakSegment

	compactions, expiredReads, compactCancels, ringCancels, resumed, lags atomic.Int64
}

func soakDuration(t *testing.T) time.Duration {
	if v := os.Getenv("SPINDLE_SOAK"); v != "" {
		d, err := time.ParseDuration(v)
		if err != nil {
			t.Fatalf("SPINDLE_SOAK=%q is not a duration such as 3m", v)
		}
		return d
	}
	if testing.Short() || raceEnabled {
		return soakShort
	}
	return soakDefault
}

// TestSoak runs random load through two proxies, processes of their own, with compactions every few
// seconds. Watchers come, lag, go and resume; readers read the past. In the end all that anybody saw is
// compared with the history: as one watch from the beginning saw it, as the writers' answers say it, and
// as the members themselves tell it.
func TestSoak(t *testing.T) {
	builtWithoutRace(t)
	t.Parallel()
	duration := soakDuration(t)
	sd := seed(t)
	members := startMembers(t, soakShards)
	ctx, cancel := context.WithTimeout(context.Background(), duration+testTimeout)
	defer cancel()

	dir := t.TempDir()
	var procs []*process
	s := &soak{
		t: t, ctx: ctx, hash: maphash.MakeSeed(), stop: make(chan struct{}), tokens: make(chan struct{}, soakRate/10), errs: make(chan error, 1),
	}
	for i := range 2 {
		url := freeURL(t)
		args := append(proxyArgs(members, url, ""), "--watch-progress-notify-interval", "1s")
		if i == 0 {
			args = append(args, "--ring-size", strconv.Itoa(soakSmallRing))
		}
		p := startProcess(t, dir, args...)
		p.awaitReady(t)
		procs = append(procs, p)
		for range 4 {
			s.conns = append(s.conns, dial(t, url))
		}
	}
	for i := range soakKeys {
		s.keys = append(s.keys, fmt.Sprintf("%s%03d", soakPrefix, i))
	}
	last := s.conns[len(s.conns)-1] // the proxy with the large ring
	s.alike = sameShard(t, last, s.keys)
	raw := s.watchMembers(members.Shards)
	truth := openWatch(t, last, soakPrefix, 1)

	rss := newRSS(t, procs)
	start := time.Now()
	var writers, others sync.WaitGroup
	for i := range soakWriters {
		writers.Go(func() { s.write(newRand(sd, i), i) })
	}
	for i := range soakReaders {
		others.Go(func() { s.read(newRand(sd, 100+i)) })
	}
	others.Go(func() { s.compact(newRand(sd, 200)) })
	var watchers sync.WaitGroup
	for i := range soakWatchers {
		watchers.Go(func() { s.watch(newRand(sd, 300+i)) })
	}

	deadline := time.After(duration)
	pace := time.NewTicker(10 * time.Millisecond)
	defer pace.Stop()
	sample := time.NewTicker(soakSampleEvery)
	defer sample.Stop()
load:
	for {
		select {
		case <-deadline:
			break load
		case err := <-s.errs:
			t.Fatal(err)
		case <-sample.C:
			rss.sample(t)
		case <-pace.C:
			for range soakRate / 100 {
				select {
				case s.tokens <- struct{}{}:
				default:
				}
			}
		}
	}
	close(s.stop)
	writers.Wait()
	others.Wait()
	took := time.Since(start)
	resp, err := last.kv.Put(ctx, &pb.PutRequest{Key: []byte(s.keys[0]), Value: []byte("the last one")})
	s.check(err)
	s.record(soakAck{rev: resp.GetHeader().GetRevision(), key: s.keys[0], value: s.sum([]byte("the last one"))})
	s.final.Store(s.newest.Load())
	watchers.Wait()
	select {
	case err := <-s.errs:
		t.Fatal(err)
	default:
	}
	rss.sample(t)

	h := s.history(truth.until(t, s.final.Load()))
	s.checkAcks(h)
	s.checkMembers(h, raw)
	s.checkReads(h)
	s.checkSegments(h)
	t.Logf("%v: %d events up to revision %d, %d writes acknowledged, %d compactions (the last at %d)",
		took.Round(time.Millisecond), len(h.events), s.final.Load(), len(s.acks), s.compactions.Load(), s.compacted.Load())
	rss.report(t, procs)
}

// check keeps the first error; the run ends with it.
func (s *soak) check(err error) bool {
	if err != nil {
		fatalOnce(s.errs, "%w", err)
	}
	return err == nil
}

func (s *soak) stopped() bool {
	select {
	case <-s.stop:
		return true
	default:
		return s.ctx.Err() != nil
	}
}

// pause lets d pass, or less if the load ends.
func (s *soak) pause(d time.Duration) {
	select {
	case <-s.stop:
	case <-s.ctx.Done():
	case <-time.After(d):
	}
}

// sum is what is kept of bytes.
func (s *soak) sum(b []byte) uint64 { return maphash.Bytes(s.hash, b) }

// kvSum is what is kept of all that a client is shown of a key.
func (s *soak) kvSum(kv *mvccpb.KeyValue) uint64 {
	return s.factsSum(string(kv.Key), s.sum(kv.Value), kv.CreateRevision, kv.ModRevision, kv.Version, kv.Lease)
}

func (s *soak) factsSum(key string, value uint64, facts ...int64) uint64 {
	return maphash.String(s.hash, fmt.Sprintf("%s %x %d", key, value, facts))
}

// rss follows the memory of processes.
type rss struct {
	pids     []int
	first    []int64
	sampled  [][]int64
	readable bool
}

func newRSS(t *testing.T, procs []*process) *rss {
	m := &rss{sampled: make([][]int64, len(procs))}
	for _, p := range procs {
		m.pids = append(m.pids, p.cmd.Process.Pid)
		kb, err := residentBytes(p.cmd.Process.Pid, "VmRSS:")
		m.readable = err == nil
		m.first = append(m.first, kb)
	}
	if !m.readable {
		t.Log("no /proc/<pid>/status here: memory is not measured")
	}
	return m
}

func (m *rss) sample(t *testing.T) {
	if !m.readable {
		return
	}
	for i, pid := range m.pids {
		b, err := residentBytes(pid, "VmRSS:")
		if err != nil {
			t.Fatal(err)
		}
		m.sampled[i] = append(m.sampled[i], b)
	}
}

func (m *rss) report(t *testing.T, procs []*process) {
	if !m.readable {
		return
	}
	for i, pid := range m.pids {
		peak, err := residentBytes(pid, "VmHWM:")
		if err != nil {
			t.Fatal(err)
		}
		all := m.sampled[i]
		at := func(part float64) int64 { return all[int(part*float64(len(all)-1))] >> 20 }
		t.Logf("proxy %d: RSS %d MiB before; after 1/4, 1/2, 3/4 of the run %d, %d, %d MiB; %d MiB at the end; peak %d MiB",
			i+1, m.first[i]>>20, at(0.25), at(0.5), at(0.75), at(1), peak>>20)
		if peak > soakMaxRSS {
			t.Errorf("proxy %d took %d MiB", i+1, peak>>20)
		}
	}
}

// residentBytes reads a memory field of a process, on Linux.
func residentBytes(pid int, field string) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field); ok {
			kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("no %s in /proc/%d/status", field, pid)
}
