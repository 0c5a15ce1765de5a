package chaos

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"

	"spindle/shard/embedded/embeddedtest"
)

const (
	// contentionWriters is how many clients of each proxy compare and swap as fast as they are answered.
	contentionWriters = 12
	// contentionKeys is how many keys they fight for, if they do.
	contentionKeys = 24
	// farBy is how much later everything arrives, each way, on the connections of the far proxy, which is the last one.
	farBy = time.Millisecond
	// reorderWindow is the proxies' default.
	reorderWindow = 250 * time.Millisecond
	// observed is how old the metrics may be.
	observed = 1200 * time.Millisecond
	// busyPause is what a machine that is busy may make of a window, and of one write.
	busyPause = 5 * time.Second
	// fairWait is how long a writer may lose all that it fights for.
	fairWait = 20 * time.Second
)

// contention is some proxies before the same members, all of them processes.
type contention struct {
	t       *testing.T
	dir     string
	links   []*link // of each proxy to everything
	proxies []*contender
	etcds   []*process
	relays  []*relay
	counted [][3]int64 // batches, rejected ones, fences of each proxy, so far
}

// contender is one of the proxies.
type contender struct {
	name    string
	args    []string
	dir     string
	metrics string
	in      *relay
	log     *lineLog
	proc    *process
	conn    *grpc.ClientConn
	seen    *contentionWatch
}

func startContention(t *testing.T, n int) *contention {
	t.Helper()
	c := &contention{t: t, dir: t.TempDir()}
	start := time.Now()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, p := range c.proxies {
			if p.proc != nil {
				p.proc.kill()
			}
			if t.Failed() {
				t.Logf("%s:\n%s", p.name, p.log)
			}
		}
		for _, e := range c.etcds {
			e.kill()
		}
		for _, r := range c.relays {
			r.l.Close()
		}
	})
	for range n {
		c.links = append(c.links, newLink())
	}
	to := func(addr string, p int) string {
		r, err := newRelay(c.links[p])
		must(err)
		c.relays = append(c.relays, r)
		r.point(addr)
		return r.url()
	}
	var urls [shards + 1][]string // by proxy; the coordinator's are the last
	for i := range urls {
		name := "coordinator"
		if i < shards {
			name = shardNames[i]
		}
		spec := etcdSpec{Name: name, Dir: c.dir + "/" + name, Token: name, Peer: "http://127.0.0.1:1", InitialCluster: name + "=http://127.0.0.1:1",
			TickMs: soloTickMs, ElectMs: soloElectMs, MaxTxnOps: memberTxnOps, MaxReq: memberReq}
		log := &lineLog{start: start}
		serving := make(chan string, 1)
		proc, err := startEtcd(spec, c.dir, log, func(says etcdSays) {
			if says.Ready {
				serving <- says.Client
			}
		})
		must(err)
		c.etcds = append(c.etcds, proc)
		select {
		case addr := <-serving:
			for p := range n {
				urls[i] = append(urls[i], to(addr, p))
			}
		case <-time.After(serveTimeout):
			t.Fatalf("%s does not serve:\n%s", name, log)
		}
	}
	for i := range n {
		p := &contender{name: fmt.Sprintf("proxy-%d", i), dir: c.dir, log: &lineLog{start: start}, metrics: embeddedtest.FreeAddr(t)}
		p.args = []string{"--listen-client-urls=http://127.0.0.1:0", "--listen-metrics-urls=http://" + p.metrics, "--coordinator=" + urls[shards][i],
			fmt.Sprint("--shard-max-txn-ops=", memberTxnOps), fmt.Sprint("--shard-max-request-bytes=", memberReq)}
		for s := range shards {
			p.args = append(p.args, "--shard="+shardNames[s]+"="+urls[s][i])
		}
		var err error
		p.in, err = newRelay(newLink())
		must(err)
		c.relays = append(c.relays, p.in)
		c.proxies = append(c.proxies, p)
		must(p.run())
		p.conn, err = dial(p.in.addr())
		must(err)
		t.Cleanup(func() { p.conn.Close() })
	}
	return c
}

// run starts the process and waits until it serves.
func (p *contender) run() error {
	serving := make(chan struct{})
	var err error
	p.proc, err = startSpindle(p.name, p.dir, p.log, func(addr string) {
		p.in.point(addr)
		close(serving)
	}, p.args...)
	if err != nil {
		return err
	}
	return awaitServing(p.name, serving, p.proc, p.log)
}

// counters reads a proxy's counters of batches, as soon as it has observed itself.
func (p *contender) counters() (batches, rejected, fences int64, err error) {
	for deadline := time.Now().Add(recoverTimeout); ; <-time.After(observed) {
		if batches, rejected, fences, err = p.countersNow(); err == nil || time.Now().After(deadline) {
			return batches, rejected, fences, err
		}
	}
}

func (p *contender) countersNow() (batches, rejected, fences int64, err error) {
	resp, err := http.Get("http://" + p.metrics + "/metrics")
	if err != nil {
		return 0, 0, 0, err
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, 0, 0, err
	}
	found := 0
	for line := range strings.SplitSeq(string(page), "\n") {
		name, value, _ := strings.Cut(line, " ")
		for want, to := range map[string]*int64{"spindle_batches_total": &batches, "spindle_batches_rejected_total": &rejected, "spindle_fences_total": &fences} {
			if name == want {
				found++
				*to, _ = strconv.ParseInt(value, 10, 64)
			}
		}
	}
	if found != 3 {
		err = fmt.Errorf("%s: %d of 3 counters", p.name, found)
	}
	return batches, rejected, fences, err
}

// contentionWatch is everything that one proxy's watch has shown.
type contentionWatch struct {
	mu     sync.Mutex
	events []seen
	heard  []time.Time
	upto   atomic.Int64
	err    error
}

func (p *contender) watch(ctx context.Context) error {
	stream, err := pb.NewWatchClient(p.conn).Watch(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte(root), RangeEnd: prefixEnd(root), StartRevision: 1, PrevKv: true,
	}}})
	if err != nil {
		return err
	}
	w := &contentionWatch{}
	p.seen = w
	go func() {
		for {
			resp, err := stream.Recv()
			w.mu.Lock()
			if err != nil || resp.Canceled {
				w.err = fmt.Errorf("%s: watch: %v, %w", p.name, resp, err)
				w.mu.Unlock()
				return
			}
			now := time.Now()
			for _, e := range resp.Events {
				w.events = append(w.events, seen{e.Kv.ModRevision, sumOfEvent(e), e.PrevKv.GetModRevision()})
				w.heard = append(w.heard, now)
			}
			w.mu.Unlock()
			if n := len(resp.Events); n > 0 {
				w.upto.Store(resp.Events[n-1].Kv.ModRevision)
			}
		}
	}()
	return nil
}

// pause returns the longest time without an event within from..to.
func (w *contentionWatch) pause(from, to time.Time) (longest time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	last := from
	for _, at := range w.heard {
		if at.After(from) && at.Before(to) {
			longest = max(longest, at.Sub(last))
			last = at
		}
	}
	return max(longest, to.Sub(last))
}

// contentionWriter counts what one writer does.
type contentionWriter struct {
	won, lost int64
	longest   time.Duration // between two successes
	took      []time.Duration
	last      int64 // revision
	err       error
}

// swap increments counters until ctx ends, one after the other in its own order.
func (w *contentionWriter) swap(ctx context.Context, conn *grpc.ClientConn, keys []string, seed uint64, stream int) {
	r := newRand(seed, stream)
	known := map[string]*mvccpb.KeyValue{}
	since := time.Now()
	defer func() { w.longest = max(w.longest, time.Since(since)) }()
	for ctx.Err() == nil {
		key := keys[r.IntN(len(keys))]
		for ctx.Err() == nil {
			kv := known[key]
			n, _ := strconv.Atoi(string(kv.GetValue()))
			asked := time.Now()
			resp, err := pb.NewKVClient(conn).Txn(ctx, &pb.TxnRequest{
				Compare: []*pb.Compare{compareMod(key, kv.GetModRevision())},
				Success: []*pb.RequestOp{opPut(key, strconv.Itoa(n+1))},
				Failure: []*pb.RequestOp{opGet(key)},
			})
			if err != nil {
				if ctx.Err() == nil {
					w.err = err
				}
				return
			}
			w.took = append(w.took, time.Since(asked))
			if !resp.Succeeded {
				w.lost++
				if kvs := resp.Responses[0].GetResponseRange().Kvs; len(kvs) == 1 {
					known[key] = kvs[0]
				}
				continue
			}
			w.won++
			w.longest = max(w.longest, time.Since(since))
			since = time.Now()
			w.last = resp.Header.Revision
			known[key] = &mvccpb.KeyValue{Value: []byte(strconv.Itoa(n + 1)), ModRevision: resp.Header.Revision}
			break
		}
	}
}

// contend lets the writers of all proxies write for a while, and returns what each did.
func (c *contention) contend(ctx context.Context, shared bool, seed uint64) [][]*contentionWriter {
	var wg sync.WaitGroup
	all := make([][]*contentionWriter, len(c.proxies))
	for p, who := range c.proxies {
		for i := range contentionWriters {
			var keys []string
			for k := range contentionKeys {
				if key := fmt.Sprintf("%sshared/%02d", root, k); shared {
					keys = append(keys, key)
				} else {
					keys = append(keys, fmt.Sprintf("%sown/%d-%d/%02d", root, p, i, k))
				}
			}
			w := &contentionWriter{}
			all[p] = append(all[p], w)
			wg.Go(func() { w.swap(ctx, who.conn, keys, seed, p*contentionWriters+i) })
		}
	}
	wg.Wait()
	return all
}

// Several proxies whose clients compare and swap on the same shards, on the same keys and on different ones: nobody starves,
// all watches show the same events, and when one is killed the watches of the others pause for a reorder window at most.
// SPINDLE_CHAOS_MEASURE=8s makes each of the loads that long.
func TestContention(t *testing.T) {
	if testing.Short() {
		t.Skip("starts seven processes")
	}
	lasts, counts, kills := 700*time.Millisecond, []int{3}, 1
	if v := os.Getenv("SPINDLE_CHAOS_MEASURE"); v != "" {
		var err error
		if lasts, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
		counts, kills = []int{2, 3}, 15
	}
	s := seedOf(t)
	for _, n := range counts {
		t.Run(fmt.Sprintf("%d proxies", n), func(t *testing.T) { testContention(t, n, lasts, kills, s) })
	}
}

func testContention(t *testing.T, n int, lasts time.Duration, kills int, s uint64) {
	c := startContention(t, n)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for _, p := range c.proxies {
		if err := p.watch(ctx); err != nil {
			t.Fatal(err)
		}
	}
	c.count()
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "distance\tkeys\twrites/s\tshare of each\trejected batches of each\tfences\tp50, ms\tp99, ms\tlongest wait of a writer")
	distances := []time.Duration{0, farBy}
	if os.Getenv("SPINDLE_CHAOS_MEASURE") == "" {
		distances = distances[1:]
	}
	for _, far := range distances {
		c.links[n-1].set(linkState{delay: far})
		for _, shared := range []bool{true, false} {
			c.load(table, far, shared, lasts, s)
		}
	}
	c.links[n-1].set(linkState{})
	c.sameEvents()

	// One is killed while all write.
	var pauses []time.Duration
	for k := range kills {
		victim := k % n
		run, stop := context.WithCancel(ctx)
		done := make(chan [][]*contentionWriter)
		go func() { done <- c.contend(run, false, s) }()
		<-time.After(min(lasts, time.Second)) // how long the load lasts
		begun := time.Now()
		c.proxies[victim].proc.kill()
		<-time.After(time.Second)
		end := time.Now()
		for i, p := range c.proxies {
			if i != victim {
				pauses = append(pauses, p.seen.pause(begun, end))
			}
		}
		stop()
		for i, ws := range <-done {
			for _, w := range ws {
				if i != victim && w.err != nil {
					t.Errorf("a client of %s: %v", c.proxies[i].name, w.err)
				}
			}
		}
		if err := c.proxies[victim].run(); err != nil {
			t.Fatal(err)
		}
		if err := c.proxies[victim].watch(ctx); err != nil {
			t.Fatal(err)
		}
	}
	c.sameEvents()
	table.Flush()
	slices.Sort(pauses)
	t.Logf("%d writers of each of %d proxies, each load for %v:\n%s", contentionWriters, n, lasts, b.String())
	t.Logf("%d kills: the watches of the others paused %v to %v, median %v; the reorder window is %v",
		kills, ms(pauses[0]), ms(pauses[len(pauses)-1]), ms(pauses[len(pauses)/2]), reorderWindow)
	if pauses[len(pauses)-1] > reorderWindow+busyPause {
		t.Errorf("the watches paused %v", pauses)
	}
}

// count reads all counters.
func (c *contention) count() {
	c.t.Helper()
	<-time.After(observed)
	c.counted = nil
	for _, p := range c.proxies {
		batches, rejected, fences, err := p.counters()
		if err != nil {
			c.t.Fatal(err)
		}
		c.counted = append(c.counted, [3]int64{batches, rejected, fences})
	}
}

// load runs one of the loads and adds its line to the table.
func (c *contention) load(table io.Writer, far time.Duration, shared bool, lasts time.Duration, s uint64) {
	t := c.t
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(lasts, cancel)
	all := c.contend(ctx, shared, s)
	before := c.counted
	c.count()
	after := c.counted
	var total, fences int64
	won := make([]int64, len(all))
	var share, rejected, p50, p99 []string
	var longest time.Duration
	for i, ws := range all {
		var took []time.Duration
		for _, w := range ws {
			if w.err != nil {
				t.Errorf("a client of %s: %v", c.proxies[i].name, w.err)
			}
			if w.won == 0 && lasts >= fairWait {
				t.Errorf("a client of %s has written nothing in %v", c.proxies[i].name, lasts)
			}
			won[i] += w.won
			longest = max(longest, w.longest)
			took = append(took, w.took...)
		}
		if won[i] == 0 {
			t.Errorf("%s has written nothing in %v", c.proxies[i].name, lasts)
		}
		total += won[i]
		slices.Sort(took)
		now := after[i]
		fences += now[2] - before[i][2]
		rejected = append(rejected, fmt.Sprintf("%.1f %% of %d", 100*float64(now[1]-before[i][1])/float64(max(1, now[0]-before[i][0])), now[0]-before[i][0]))
		p50, p99 = append(p50, fmt.Sprintf("%.1f", toMs(quantile(took, 0.5)))), append(p99, fmt.Sprintf("%.1f", toMs(quantile(took, 0.99))))
	}
	for _, n := range won {
		share = append(share, fmt.Sprintf("%.0f %%", 100*float64(n)/float64(max(1, total))))
	}
	// Who fights for a key and is far away learns late what to compare with, and loses more often: with one etcd, too.
	if !shared && longest > busyPause {
		t.Errorf("a writer that fights with nobody waited for %v", longest)
	}
	distance, keys := "equal", "different"
	if far > 0 {
		distance = "the last: " + far.String()
	}
	if shared {
		keys = "the same"
	}
	fmt.Fprintf(table, "%s\t%s\t%.0f\t%s\t%s\t%d\t%s\t%s\t%v\n", distance, keys, float64(total)/lasts.Seconds(), strings.Join(share, ", "),
		strings.Join(rejected, ", "), fences, strings.Join(p50, ", "), strings.Join(p99, ", "), ms(longest))
}

// sameEvents waits until all watches have shown the last write, and compares what they have shown.
func (c *contention) sameEvents() {
	t := c.t
	ctx, cancel := context.WithTimeout(context.Background(), recoverTimeout)
	defer cancel()
	resp, err := pb.NewKVClient(c.proxies[0].conn).Put(ctx, &pb.PutRequest{Key: []byte(root + "last")})
	if err != nil {
		t.Fatal(err)
	}
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for _, p := range c.proxies {
		for p.seen.upto.Load() < resp.Header.Revision {
			p.seen.mu.Lock()
			err := p.seen.err
			p.seen.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
			select {
			case <-poll.C:
			case <-ctx.Done():
				t.Fatalf("%s: the watch is at %d of %d", p.name, p.seen.upto.Load(), resp.Header.Revision)
			}
		}
	}
	first := c.proxies[0].seen
	first.mu.Lock()
	defer first.mu.Unlock()
	for _, p := range c.proxies[1:] {
		p.seen.mu.Lock()
		if !slices.Equal(first.events, p.seen.events) {
			t.Errorf("%s shows other events than %s: %d and %d", p.name, c.proxies[0].name, len(p.seen.events), len(first.events))
		}
		p.seen.mu.Unlock()
	}
	t.Logf("%d events, the same by all proxies", len(first.events))
}
