package load

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"spindle/codec"
	"spindle/server/node"
	"spindle/shard/embedded"
)

const readyTimeout = 60 * time.Second

// startEtcd starts an ordinary etcd, with its default limits.
func startEtcd(t testing.TB) string {
	t.Helper()
	m, err := embedded.Start(embedded.Config{Dir: filepath.Join(t.TempDir(), "etcd"), Shards: 1, NoFsync: true, DefaultLimits: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m.Shards[0]
}

// startSpindle starts a proxy over two shards.
func startSpindle(t testing.TB) string {
	t.Helper()
	m, err := embedded.Start(embedded.Config{Dir: filepath.Join(t.TempDir(), "members"), Shards: 2, NoFsync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	cfg := node.Config{
		ListenClientURLs: []string{"http://127.0.0.1:0"}, Coordinator: []string{m.Coordinator}, ShardTimeout: readyTimeout,
		ShardMaxTxnOps: embedded.MaxTxnOps, ShardMaxRequestBytes: embedded.MaxRequestBytes,
	}
	for i, u := range m.Shards {
		cfg.Shards = append(cfg.Shards, node.Shard{Name: m.Names[i], URLs: []string{u}})
	}
	n, err := node.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	select {
	case <-n.Ready():
	case err := <-n.Failed():
		t.Fatal(err)
	case <-time.After(readyTimeout):
		t.Fatal("the proxy is not ready")
	}
	return n.ClientURLs()[0]
}

// small is a load that ends soon.
func small(endpoint string, mix string) Spec {
	s := Default()
	var err error
	if s.Mix, err = ParseMix(mix); err != nil {
		panic(err)
	}
	s.Endpoints, s.Clients, s.Connections = []string{endpoint}, 16, 3
	s.Warmup, s.Duration = 50*time.Millisecond, 300*time.Millisecond
	s.Keys, s.PageSize, s.Seed = 100, 30, rand.Uint64()
	return s
}

// try runs s, longer and longer on a machine that is too busy for it: until each client has done some of every kind, and every watch
// has shown something.
func try(t *testing.T, s Spec, kinds ...string) *Result {
	t.Helper()
	for n := 0; ; n++ {
		s := s
		s.Duration <<= n
		if n > 0 {
			s.Prefix = fmt.Sprintf("%s%d/", s.Prefix, n) // what is there already is another load's
		}
		res, err := Run(t.Context(), s, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		thin := res.Total.Count == 0
		for _, kind := range kinds {
			thin = thin || res.count(kind) < 3*uint64(s.Clients)
		}
		for _, w := range res.Watches {
			thin = thin || w.Events == 0 || w.FromSend.Count == 0
		}
		if !thin || s.Duration > readyTimeout/4 {
			return res
		}
	}
}

// count is how many of a kind were answered.
func (res *Result) count(kind string) uint64 {
	i := slices.IndexFunc(res.Ops, func(op Op) bool { return op.Kind == kind })
	if i < 0 {
		return 0
	}
	return res.Ops[i].Count
}

// check fails if anything of res is not as it should be on a server that works.
func check(t *testing.T, res *Result) {
	t.Helper()
	if res.Total.Count == 0 {
		t.Error("nothing was answered")
	}
	if res.Total.Errors != 0 || res.Total.Conflicts != 0 || res.Unfinished != 0 {
		t.Errorf("%d errors %v, %d conflicts, %d unfinished", res.Total.Errors, res.Texts, res.Total.Conflicts, res.Unfinished)
	}
	for _, w := range res.Watches {
		if w.Events == 0 || w.Missing != 0 || w.Backwards != 0 {
			t.Errorf("watch of %s: %d events, %d missing, %d backwards", w.Name, w.Events, w.Missing, w.Backwards)
		}
		if w.FromSend.Count == 0 || w.FromAck.Count == 0 || w.FromAck.P50 > w.FromSend.P50 {
			t.Errorf("watch of %s: lags %+v %+v", w.Name, w.FromAck, w.FromSend)
		}
	}
}

// Every work is done, without an error, by a real etcd and by Spindle, and the watches see all of it.
func TestWorks(t *testing.T) {
	for name, start := range map[string]func(testing.TB) string{"etcd": startEtcd, "spindle": startSpindle} {
		t.Run(name, func(t *testing.T) {
			endpoint := start(t)
			for _, kind := range Works {
				w := kind.Work
				if w == Idle {
					continue
				}
				t.Run(string(w), func(t *testing.T) {
					s := small(endpoint, string(w))
					s.Prefix = "/" + string(w) + "/"
					writes := s.Mix.has(Create, Update, Pod)
					s.WatchAll = writes || s.Mix.has(Heartbeat, Event)
					if writes {
						s.Watchers, s.WatchConnections = 5, 2
					}
					last := string(w) // what it ends with
					if w == Pod {
						last = "delete"
					}
					res := try(t, s, last)
					check(t, res)
					if res.count(last) == 0 {
						t.Errorf("no %s in %+v", w, res.Ops)
					}
				})
			}
			t.Run("mix", func(t *testing.T) {
				s := small(endpoint, "create=2,get=5,update=3,heartbeat=4,page=1,list=1,stream=1,pod=6")
				s.Rate = 400
				check(t, try(t, s))
			})
		})
	}
}

// What stands in etcd and in Spindle afterwards is what was counted, in the shape that was promised.
func TestContents(t *testing.T) {
	for name, start := range map[string]func(testing.TB) string{"etcd": startEtcd, "spindle": startSpindle} {
		t.Run(name, func(t *testing.T) { testContents(t, start(t)) })
	}
}

func testContents(t *testing.T, endpoint string) {
	s := small(endpoint, "event")
	s.Warmup, s.ValueSize = 0, 100
	res := try(t, s, "event")
	check(t, res)
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), readyTimeout)
	defer cancel()
	prefix := res.Spec.Prefix + "events/"
	all, err := c.Get(ctx, prefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	counted := res.count("event")
	// A few were written just before and after the measured time.
	if n := uint64(len(all.Kvs)); n < counted || n > 2*counted+10*uint64(s.Clients) {
		t.Errorf("%d events were counted, %d are there", counted, n)
	}
	leases := map[int64]int{}
	for _, kv := range all.Kvs {
		leases[kv.Lease]++
		if kv.Version != 1 || len(kv.Value) != s.ValueSize || !strings.HasPrefix(string(kv.Key), prefix+"ns-") {
			t.Fatalf("%q: version %d, %d bytes", kv.Key, kv.Version, len(kv.Value))
		}
		if _, ok := sentAt(kv.Value); !ok {
			t.Fatalf("%q has no stamp", kv.Key)
		}
	}
	if leases[0] != 0 || len(leases) != s.Clients {
		t.Errorf("%d clients, %d events without a lease, %d leases", s.Clients, leases[0], len(leases))
	}
}

// An open loop sends as many requests as were asked for, whatever the server's speed.
func TestOpenLoop(t *testing.T) {
	s := small(startEtcd(t), "get")
	s.Rate, s.Duration, s.Warmup = 500, time.Second, 100*time.Millisecond
	res := try(t, s)
	check(t, res)
	due := s.Rate * res.Seconds
	if got := float64(res.Total.Count) + float64(res.NeverSent); got < due*0.8 || got > due*1.2 {
		t.Errorf("%.0f requests in %.2f s at %.0f/s, %d never sent", got, res.Seconds, s.Rate, res.NeverSent)
	}
}

// Requests that wait for a free client are late by as much.
func TestOpenLoopCountsWaiting(t *testing.T) {
	r := &run{weights: 1}
	g := &group{run: r, first: 1000, period: 250}
	r.stopped.Store(true) // nothing is sent
	a := &worker{g: g}
	g.idle = []*worker{a}
	if g.pump(999); g.sent != 0 {
		t.Error("sent before it was due")
	}
	if g.pump(1600); g.sent != 1 || len(g.idle) != 0 {
		t.Error("one client sends one request")
	}
	if a.start != 1000 {
		t.Errorf("it counts from %d, and was due at 1000", a.start)
	}
	if due := g.due(); due != 1250 {
		t.Errorf("the next one is due at %d", due)
	}
}

func TestErrors(t *testing.T) {
	s := small("http://127.0.0.1:1", "create")
	if _, err := Run(t.Context(), s, io.Discard); err == nil {
		t.Error("no error without a server")
	}
	for _, mix := range []string{"", "creat", "create=0", "create=x", "idle,get"} {
		if m, err := ParseMix(mix); err == nil {
			t.Errorf("%q is %v", mix, m)
		}
	}
	for i, change := range []func(*Spec){
		func(s *Spec) { s.Clients = 0 }, func(s *Spec) { s.ValueSize = 3 }, func(s *Spec) { s.Duration = 0 },
		func(s *Spec) { s.Prefix = "x" }, func(s *Spec) { s.Rate = -1 }, func(s *Spec) { s.Watchers = -1 },
		func(s *Spec) { s.Mix = Mix{{Idle, 1}} }, func(s *Spec) { s.Endpoints = append(s.Endpoints, "") },
	} {
		s := small("http://x:1", "create")
		change(&s)
		if s.Validate() == nil {
			t.Errorf("spec %d passes", i)
		}
	}
}

func TestEndpoint(t *testing.T) {
	for s, want := range map[string]string{
		"http://127.0.0.1:2379": "127.0.0.1:2379", "https://etcd-0.etcd:2379": "etcd-0.etcd:2379", "http://[::1]:2379/": "[::1]:2379",
		"": "", "127.0.0.1:2379": "", "localhost:2379": "", "http://127.0.0.1": "", "unix:///x": "", "http://:2379": "", "http://a:0": "", "http://a:65536": "",
		"http://user@a:1": "", "http://a:1/x": "", "http://a:1?x": "", "ftp://a:1": "", "http://a:1,http://b:1": "", " http://a:1": "",
	} {
		address, secure, err := endpoint(s)
		if address != want || (err == nil) != (want != "") || secure != strings.HasPrefix(s, "https:") && err == nil {
			t.Errorf("%q: %q %v %v", s, address, secure, err)
		}
	}
}

// Who cannot connect is told what to do.
func TestAdvice(t *testing.T) {
	plain, secure, picky := httptest.NewServer(nil), httptest.NewUnstartedServer(nil), httptest.NewUnstartedServer(nil)
	secure.EnableHTTP2, picky.EnableHTTP2 = true, true
	secure.StartTLS()
	picky.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	picky.StartTLS()
	for _, s := range []*httptest.Server{plain, secure, picky} {
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		defer s.Close()
	}
	trust := x509.NewCertPool()
	trust.AddCert(picky.Certificate())
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	other := func(url, scheme string) string { return scheme + url[strings.Index(url, "://"):] }
	for _, c := range []struct {
		endpoint, want string
		roots          *x509.CertPool
	}{
		{"http://" + closed.Addr().String(), "--endpoints", nil},
		{other(secure.URL, "http"), "begins with https://", nil},
		{other(plain.URL, "https"), "begins with http://", nil},
		{secure.URL, "--cacert", nil},
		{picky.URL, "--cert and --key", trust},
		{plain.URL, "is it an etcd?", nil},
	} {
		s := small(c.endpoint, "create")
		s.TLS = &tls.Config{RootCAs: c.roots}
		if _, err := Run(t.Context(), s, io.Discard); err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), c.endpoint) {
			t.Errorf("%s: %v, want %q", c.endpoint, err, c.want)
		}
	}
}

// A server that wants to know its users is told; one that does not is not asked twice.
func TestUser(t *testing.T) {
	endpoint := startEtcd(t)
	s := small(endpoint, "create=2,get,event")
	s.WatchAll, s.User, s.Password = true, "root", "secret"
	check(t, try(t, s)) // as yet it asks nobody

	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), readyTimeout)
	defer cancel()
	_, err1 := c.UserAdd(ctx, s.User, s.Password)
	_, err2 := c.UserGrantRole(ctx, s.User, "root")
	_, err3 := c.AuthEnable(ctx)
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	s.Prefix = "/again/"
	check(t, try(t, s))
	for _, mix := range []string{"create", "get"} { // they would be refused one after the other
		nobody := small(endpoint, mix)
		nobody.Duration = time.Hour
		if res, err := Run(t.Context(), nobody, io.Discard); res != nil || err == nil || !strings.Contains(err.Error(), "--user") {
			t.Errorf("%+v %v", res, err)
		}
	}
	s.Password = "guess"
	if _, err := Run(t.Context(), s, io.Discard); err == nil || !strings.Contains(err.Error(), "authentication failed") {
		t.Error(err)
	}
}

// A server that goes away ends the load with an error; what was measured until then is not lost.
func TestServerLost(t *testing.T) {
	m, err := embedded.Start(embedded.Config{Dir: filepath.Join(t.TempDir(), "etcd"), Shards: 1, NoFsync: true})
	if err != nil {
		t.Fatal(err)
	}
	s := small(m.Shards[0], "get")
	s.Duration = time.Minute
	lines := &firstLine{seen: make(chan struct{})}
	go func() {
		<-lines.seen
		m.Close()
	}()
	begin := time.Now()
	res, err := Run(t.Context(), s, lines)
	if err == nil || time.Since(begin) > readyTimeout/2 {
		t.Errorf("%v after %v", err, time.Since(begin))
	}
	if res == nil || res.Stopped != err.Error() || res.Total.Count == 0 || len(res.Series) == 0 || res.Seconds >= s.Duration.Seconds() {
		t.Errorf("%+v", res)
	}
	m.Close()
}

// So it is when somebody has seen enough. Before the measurement there is nothing to tell.
func TestInterrupted(t *testing.T) {
	s := small(startEtcd(t), "create")
	s.Duration, s.WatchAll = time.Minute, true
	lines := &firstLine{seen: make(chan struct{})}
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		<-lines.seen
		cancel(why)
	}()
	res, err := Run(ctx, s, lines)
	if !errors.Is(err, why) || res == nil || res.Stopped != "enough" || res.Total.Count == 0 || res.Watches[0].Events == 0 || res.Unfinished != 0 {
		t.Errorf("%+v %v", res, err)
	}
	if res, err := Run(ctx, s, io.Discard); !errors.Is(err, why) || res != nil {
		t.Errorf("%+v %v", res, err)
	}
}

// Ctrl-C ends a load on a server that has stopped to read, while it writes and holds the connection.
func TestInterruptedDeaf(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	over, canceled := make(chan struct{}), make(chan time.Time, 1)
	defer close(over)
	go func() {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		defer nc.Close()
		c := codec.NewServerConn(codec.ConnConfig{StreamWindow: 1 << 30, ConnWindow: 1 << 30, MaxConcurrentStreams: 1000}, nil)
		_, _ = nc.Write(c.Output())
		_, _ = io.ReadFull(nc, make([]byte, 1<<20)) // far more will come than fits into the sockets
		canceled <- time.Now()
		cancel(why)
		<-over
	}()
	s := Default()
	s.Endpoints, s.Clients, s.Connections, s.ValueSize, s.Warmup = []string{"http://" + l.Addr().String()}, 64, 1, maxValueSize, 0
	_, err = Run(ctx, s, io.Discard)
	if took := time.Since(<-canceled); !errors.Is(err, why) || took > 9*time.Second { // the client itself would give up after 10
		t.Errorf("%v after %v", err, took)
	}
}

// firstLine closes seen when a second of the load is over.
type firstLine struct {
	seen chan struct{}
	done bool
}

func (f *firstLine) Write(p []byte) (int, error) {
	if !f.done && strings.Contains(string(p), "p99") {
		f.done = true
		close(f.seen)
	}
	return len(p), nil
}

func TestKeys(t *testing.T) {
	k := keys{prefix: "/registry/", tag: "t"}
	for got, want := range map[string]string{
		string(k.pod(nil, 7)):                      "/registry/pods/ns-07/pod-00000007",
		string(k.pod(nil, 123456789)):              "/registry/pods/ns-09/pod-123456789",
		string(k.node([]byte("xx"), 42)):           "/registry/leases/kube-node-lease/node-00000042",
		string(k.fresh(nil, "events", 3, 1000021)): "/registry/events/ns-01/new-t-00003-01000021",
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	k.spread = maxNameSpread
	lengths := map[int]int{}
	for n := range int64(64 * 100) {
		lengths[len(k.fresh(nil, "pods", int(n%7), n))]++
	}
	for size, n := range lengths {
		if base := len("/registry/pods/ns-01/new-t-00003-00000021"); size < base || size >= base+maxNameSpread || n < 50 || n > 200 {
			t.Errorf("%d names of %d bytes", n, size)
		}
	}
	if len(lengths) != maxNameSpread {
		t.Errorf("%d lengths of names", len(lengths))
	}
	for i := range int64(2000) {
		n := rand.Int64N(1 << 40)
		if got, want := string(appendPadded(nil, n>>(i%40), 8)), fmt.Sprintf("%08d", n>>(i%40)); got != want {
			t.Fatal(got, want)
		}
	}
}

func TestParseStat(t *testing.T) {
	line := "12 (a ) b (c) S 1 2 3 4 5 6 7 8 9 10 1234 66 0 0 20 0"
	if cpu, err := parseStat([]byte(line)); err != nil || cpu != 13 {
		t.Error(cpu, err)
	}
	if _, err := parseStat([]byte("12 (x) S 1")); err == nil {
		t.Error("no error")
	}
	if used, all := parseMachine([]byte("cpu  100 200 300 4000 500 60 70 800 90 0\ncpu0 1 2 3\n")); used != 14 || all != 59 {
		t.Error(used, all)
	}
	if used, all := parseMachine(nil); used != 0 || all != 0 {
		t.Error(used, all)
	}
}
