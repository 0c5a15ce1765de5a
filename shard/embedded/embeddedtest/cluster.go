package embeddedtest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"spindle/shard/embedded"
)

// Timers of the nodes: short, so that tests are, and long enough for a node that gets no CPU for a while.
const (
	heartbeatMs = 50
	electionMs  = 500
	// patience is how long anything may take before the test is failed.
	patience = 60 * time.Second
)

// Cluster is one etcd cluster. Its methods fail the test when something does not happen in time. They may be called
// on the test's goroutine only, except those that say otherwise.
type Cluster struct {
	t     testing.TB
	nodes []*node
	token string
	all   string // --initial-cluster
	start func(*embed.Config)
}

type node struct {
	name         string
	dir          string
	client, peer *Relay
	cutOff       bool     // owned by the test's goroutine
	id           types.ID // from the first start on

	mu    sync.Mutex
	etcd  *embed.Etcd   // nil when it does not run
	ended chan struct{} // closed when the last one has let go of its files
}

// Start starts a cluster of n nodes and waits until every one serves; it is stopped when the test ends. change, if not
// nil, sees the configuration of every node before each of its starts.
func Start(t testing.TB, n int, change func(*embed.Config)) *Cluster {
	t.Helper()
	var token [16]byte
	rand.Read(token[:])
	c := &Cluster{t: t, token: hex.EncodeToString(token[:]), start: change}
	dir := t.TempDir()
	var all []string
	for i := range n {
		name := fmt.Sprintf("node-%d", i+1)
		nd := &node{name: name, dir: filepath.Join(dir, name), client: NewRelay(t), peer: NewRelay(t), ended: make(chan struct{})}
		close(nd.ended)
		c.nodes = append(c.nodes, nd)
		all = append(all, name+"="+nd.peer.URL())
	}
	c.all = strings.Join(all, ",")
	t.Cleanup(c.close)
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i, nd := range c.nodes {
		wg.Go(func() { errs[i] = c.run(nd) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
	c.AwaitHealthy()
	return c
}

// run starts the etcd of a node that does not run. It may not serve yet when run returns.
func (c *Cluster) run(nd *node) error {
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = nd.name, nd.dir
	any := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenPeerUrls, cfg.ListenClientUrls = []url.URL{any}, []url.URL{any}
	cfg.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: nd.peer.Addr()}}
	cfg.AdvertiseClientUrls = []url.URL{{Scheme: "http", Host: nd.client.Addr()}}
	cfg.InitialCluster, cfg.InitialClusterToken = c.all, c.token
	cfg.EnableGRPCGateway = false
	cfg.TickMs, cfg.ElectionMs = heartbeatMs, electionMs
	cfg.UnsafeNoFsync = true
	cfg.MaxTxnOps, cfg.MaxRequestBytes = embedded.MaxTxnOps, embedded.MaxRequestBytes
	cfg.QuotaBackendBytes = embedded.QuotaBytes
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	if c.start != nil {
		c.start(cfg)
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return fmt.Errorf("%s: %w", nd.name, err)
	}
	nd.id = e.Server.MemberID()
	nd.mu.Lock()
	nd.etcd, nd.ended = e, make(chan struct{})
	nd.mu.Unlock()
	nd.peer.SetTarget(e.Peers[0].Addr().String())
	nd.client.SetTarget(e.Clients[0].Addr().String())
	return nil
}

// Nodes returns the number of nodes.
func (c *Cluster) Nodes() int { return len(c.nodes) }

// URLs returns the client URLs of the nodes. They stay over restarts. Any goroutine.
func (c *Cluster) URLs() []string {
	urls := make([]string, len(c.nodes))
	for i := range urls {
		urls[i] = c.URL(i)
	}
	return urls
}

// URL returns the client URL of node i. Any goroutine.
func (c *Cluster) URL(i int) string { return c.nodes[i].client.URL() }

// Relay returns what stands between clients and node i. Any goroutine.
func (c *Cluster) Relay(i int) *Relay { return c.nodes[i].client }

// Etcd returns the etcd that node i runs, nil when it is stopped. Any goroutine.
func (c *Cluster) Etcd(i int) *embed.Etcd {
	nd := c.nodes[i]
	nd.mu.Lock()
	defer nd.mu.Unlock()
	return nd.etcd
}

// Leader returns the node that leads, -1 when there is none at the moment: the one that most nodes follow, so a leader
// that was cut off and does not know it yet does not count. Any goroutine.
func (c *Cluster) Leader() int {
	votes := make([]int, len(c.nodes))
	for i := range c.nodes {
		e := c.Etcd(i)
		if e == nil {
			continue
		}
		for j := range c.nodes {
			if o := c.Etcd(j); o != nil && o.Server.MemberID() == e.Server.Leader() {
				votes[j]++
			}
		}
	}
	for j, n := range votes {
		if n > len(c.nodes)/2 {
			return j
		}
	}
	return -1
}

// AwaitLeader waits until there is a leader, other than the given node (-1: any), and returns it.
func (c *Cluster) AwaitLeader(other int) int {
	c.t.Helper()
	leader := -1
	c.wait("a leader", func() bool {
		leader = c.Leader()
		return leader >= 0 && leader != other
	})
	return leader
}

// Follower returns a node that runs and does not lead.
func (c *Cluster) Follower() int {
	c.t.Helper()
	leader := c.AwaitLeader(-1)
	for i := range c.nodes {
		if i != leader && c.Etcd(i) != nil {
			return i
		}
	}
	c.t.Fatal("no node follows")
	return -1
}

// MoveLeader makes node i the leader.
func (c *Cluster) MoveLeader(i int) {
	c.t.Helper()
	to := uint64(c.Etcd(i).Server.MemberID())
	c.wait("the leader to move", func() bool {
		from := c.Leader()
		if from == i {
			return true
		}
		if from >= 0 {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			s := c.Etcd(from).Server
			_ = s.MoveLeader(ctx, uint64(s.MemberID()), to) // tried again until it is so
		}
		return false
	})
}

// Stop stops node i as SIGTERM does, and returns when it has ended: leadership is handed over, clients get GOAWAY, and
// streams that stay are cut after some seconds.
func (c *Cluster) Stop(i int) { c.end(i, true) }

// Kill ends node i as kill -9 does: its sockets are reset and it says nothing more to anybody.
func (c *Cluster) Kill(i int) { c.end(i, false) }

func (c *Cluster) end(i int, graceful bool) {
	nd := c.nodes[i]
	nd.mu.Lock()
	e, ended := nd.etcd, nd.ended
	nd.etcd = nil
	nd.mu.Unlock()
	if e == nil {
		return
	}
	if graceful {
		e.Close()
		nd.client.SetTarget("")
		nd.peer.SetTarget("")
		close(ended)
		return
	}
	nd.client.SetTarget("")
	nd.peer.SetTarget("")
	for j := range c.nodes {
		c.cut(i, e, j, c.Etcd(j), true) // connections that it made itself
	}
	e.Server.HardStop()
	for j := range c.nodes {
		c.cut(i, nil, j, c.Etcd(j), false)
	}
	go func() {
		e.Close()
		close(ended)
	}()
}

// Restart starts node i again with its data. It does not wait until the node is healthy.
func (c *Cluster) Restart(i int) {
	c.t.Helper()
	nd := c.nodes[i]
	nd.mu.Lock()
	ended, running := nd.ended, nd.etcd != nil
	nd.mu.Unlock()
	if running {
		c.t.Fatalf("%s runs", nd.name)
	}
	<-ended
	if err := c.run(nd); err != nil {
		c.t.Fatal(err)
	}
	nd.cutOff = false
	for j, o := range c.nodes {
		if o.cutOff {
			c.Cut(j)
		}
	}
}

// Cut drops all messages between node i and its peers, in both directions; clients still reach it. It lasts until
// Heal, or until node i is started anew.
func (c *Cluster) Cut(i int) { c.partition(i, true) }

// Heal ends Cut.
func (c *Cluster) Heal(i int) { c.partition(i, false) }

func (c *Cluster) partition(i int, cut bool) {
	c.nodes[i].cutOff = cut
	for j := range c.nodes {
		c.cut(i, c.Etcd(i), j, c.Etcd(j), cut)
	}
}

// cut lets nodes i and j (nil: not running) hear each other, or not.
func (c *Cluster) cut(i int, a *embed.Etcd, j int, b *embed.Etcd, cut bool) {
	if i == j {
		return
	}
	for _, way := range []struct {
		e  *embed.Etcd
		to int
	}{{a, j}, {b, i}} {
		if way.e == nil {
			continue
		}
		if peer := c.nodes[way.to].id; cut {
			way.e.Server.CutPeer(peer)
		} else {
			way.e.Server.MendPeer(peer)
		}
	}
}

// AwaitHealthy waits until the given nodes, or all that run, follow a leader and serve linearizable reads.
func (c *Cluster) AwaitHealthy(nodes ...int) {
	c.t.Helper()
	if len(nodes) == 0 {
		for i := range c.nodes {
			if c.Etcd(i) != nil {
				nodes = append(nodes, i)
			}
		}
	}
	for _, i := range nodes {
		c.wait(c.nodes[i].name+" to be healthy", func() bool {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			s := c.Etcd(i).Server
			select {
			case <-s.ReadyNotify():
			default:
				return false
			}
			return s.LinearizableReadNotify(ctx) == nil
		})
	}
}

// wait polls, as nothing tells of elections.
func (c *Cluster) wait(what string, cond func() bool) {
	c.t.Helper()
	deadline := time.Now().Add(patience)
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for !cond() {
		if time.Now().After(deadline) {
			c.t.Fatalf("waited %v for %s", patience, what)
		}
		<-poll.C
	}
}

func (c *Cluster) close() {
	var wg sync.WaitGroup
	for i, nd := range c.nodes {
		wg.Go(func() {
			c.end(i, false)
			<-nd.ended
		})
	}
	wg.Wait()
}
