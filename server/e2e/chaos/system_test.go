package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"spindle/shard"
)

const (
	proxies = 2
	// The shards by their place in shardNames; tripled is the one with three nodes.
	shards  = 3
	tripled = 1
	// shardTimeout is the proxies' --shard-timeout. Requests may take three times as long.
	shardTimeout = 2 * time.Second

	memberTxnOps = 1024
	memberReq    = 1638400

	soloTickMs, soloElectMs = 20, 200
	// Nodes of one cluster must not take a busy machine for a lost leader.
	trioTickMs, trioElectMs = 100, 1000
)

// debugging shows what the processes say, in detail, whatever comes of it.
var debugging = os.Getenv("SPINDLE_TEST_DEBUG") != ""

var shardNames = [shards]string{"solo-a", "trio", "solo-b"}

// member is one etcd node, or the coordinator.
type member struct {
	spec  etcdSpec
	shard int // -1: the coordinator
	log   *lineLog
	in    [proxies]*relay
	link  [proxies]*link // of the proxies' connections
	peer  *relay         // of the other nodes' connections; nil: it has none

	mu      sync.Mutex
	proc    *process
	id      string
	client  string // where it listens now
	disk    bool   // it can be made slow
	serving chan struct{}
}

// proxy is one spindle.
type proxy struct {
	name string
	args []string
	dir  string
	log  *lineLog
	in   *relay // of clients
	link *link  // theirs

	mu      sync.Mutex
	proc    *process
	serving chan struct{}
}

// system is all of it.
type system struct {
	dir         string
	start       time.Time
	members     []*member // of all shards
	coordinator *member
	proxies     [proxies]*proxy

	peerMu    sync.Mutex
	peerLinks map[[2]string]*link // by member IDs, from and to

	partition *shard.Partition
	place     [shards]int // the shard in shardNames by its index in the map
}

// peerLink returns the link of the connections of one node to another.
func (s *system) peerLink(from, to string) *link {
	s.peerMu.Lock()
	defer s.peerMu.Unlock()
	k := [2]string{from, to}
	l := s.peerLinks[k]
	if l == nil {
		l = newLink()
		s.peerLinks[k] = l
	}
	return l
}

// startSystem starts everything and waits until both proxies serve.
func startSystem(t *testing.T, start time.Time) *system {
	t.Helper()
	s := &system{dir: t.TempDir(), start: start, peerLinks: map[[2]string]*link{}}
	t.Cleanup(func() { s.stop(t) })
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	newLog := func() *lineLog { return &lineLog{start: start} }
	addMember := func(name string, place int) *member {
		m := &member{shard: place, log: newLog()}
		m.spec = etcdSpec{Name: name, Dir: filepath.Join(s.dir, name), Token: name, TickMs: soloTickMs, ElectMs: soloElectMs, MaxTxnOps: memberTxnOps, MaxReq: memberReq}
		for p := range proxies {
			var err error
			m.link[p] = newLink()
			m.in[p], err = newRelay(m.link[p])
			must(err)
		}
		var err error
		m.peer, err = newPeerRelay(func(from string) *link {
			m.mu.Lock()
			to := m.id
			m.mu.Unlock()
			return s.peerLink(from, to)
		})
		must(err)
		m.spec.Peer = m.peer.url()
		m.spec.InitialCluster = name + "=" + m.spec.Peer
		return m
	}
	s.coordinator = addMember("coordinator", -1)
	for i, name := range shardNames {
		if i != tripled {
			m := addMember(name, i)
			m.spec.Disk = true
			s.members = append(s.members, m)
			continue
		}
		var trio []*member
		var all []string
		for n := range 3 {
			m := addMember(fmt.Sprintf("%s-%d", name, n+1), i)
			m.spec.Disk, m.spec.Token, m.spec.TickMs, m.spec.ElectMs = true, name, trioTickMs, trioElectMs
			trio, all = append(trio, m), append(all, m.spec.InitialCluster)
		}
		for _, m := range trio {
			m.spec.InitialCluster = strings.Join(all, ",")
		}
		s.members = append(s.members, trio...)
	}
	for _, m := range append(s.members, s.coordinator) {
		must(m.run(s.dir))
	}
	for _, m := range append(s.members, s.coordinator) {
		must(m.await())
	}
	for i := range s.proxies {
		p := &proxy{name: fmt.Sprintf("proxy-%d", i), dir: s.dir, log: newLog()}
		var err error
		p.link = newLink()
		p.in, err = newRelay(p.link)
		must(err)
		p.args = []string{
			"--listen-client-urls=http://127.0.0.1:0", "--listen-metrics-urls=",
			"--coordinator=" + s.coordinator.in[i].url(), "--shard-timeout=" + shardTimeout.String(),
			fmt.Sprint("--shard-max-txn-ops=", memberTxnOps), fmt.Sprint("--shard-max-request-bytes=", memberReq),
		}
		if debugging {
			p.args = append(p.args, "--log-level=debug")
		}
		for place, name := range shardNames {
			var urls []string
			for _, m := range s.nodes(place) {
				urls = append(urls, m.in[i].url())
			}
			p.args = append(p.args, "--shard="+name+"="+strings.Join(urls, ","))
		}
		s.proxies[i] = p
		must(p.run())
	}
	for _, p := range s.proxies {
		must(p.await())
	}
	must(s.learnPartition())
	return s
}

func (s *system) stop(t *testing.T) {
	show := t.Failed() || debugging
	for _, p := range s.proxies {
		if p != nil {
			if p.proc != nil {
				p.proc.kill()
			}
			if show {
				t.Logf("%s:\n%s", p.name, p.log)
			}
			p.in.l.Close()
		}
	}
	for _, m := range append(s.members, s.coordinator) {
		if m == nil {
			continue
		}
		if m.proc != nil {
			m.proc.kill()
		}
		if show && testing.Verbose() {
			t.Logf("%s:\n%s", m.spec.Name, m.log)
		}
		for _, r := range m.in {
			r.l.Close()
		}
		m.peer.l.Close()
	}
}

// nodes returns the nodes of a shard.
func (s *system) nodes(place int) []*member {
	var out []*member
	for _, m := range s.members {
		if m.shard == place {
			out = append(out, m)
		}
	}
	return out
}

// slowDisks says whether the members' disks can be made slow.
func (s *system) slowDisks() bool {
	return !slices.ContainsFunc(s.members, func(m *member) bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return !m.disk
	})
}

// learnPartition reads the map from a member, so that the test knows where a key lies.
func (s *system) learnPartition() error {
	ctx, cancel := context.WithTimeout(context.Background(), serveTimeout)
	defer cancel()
	conn, err := dial(s.members[0].client)
	if err != nil {
		return err
	}
	defer conn.Close()
	resp, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(shard.KeyMap)})
	if err != nil {
		return err
	}
	if len(resp.Kvs) != 1 {
		return errors.New("the member has no map")
	}
	m, err := shard.ParseMap(resp.Kvs[0].Value)
	if err != nil {
		return err
	}
	for i, known := range m.Shards {
		for place, name := range shardNames {
			if name == known.Name {
				s.place[i] = place
			}
		}
	}
	s.partition = shard.NewPartition(m)
	return nil
}

// shardOf returns the place of the shard that a key lies on.
func (s *system) shardOf(key string) int { return s.place[s.partition.ShardOf([]byte(key))] }

// keyOn returns the first key that lies on a shard, of prefix, prefix.1, prefix.2, ...
func (s *system) keyOn(place int, prefix string) string {
	key := prefix
	for i := 1; s.shardOf(key) != place; i++ {
		key = fmt.Sprintf("%s.%d", prefix, i)
	}
	return key
}

// leader returns the node of a shard that leads it, nil if none says so in time.
func (s *system) leader(place int) *member {
	for _, m := range s.nodes(place) {
		m.mu.Lock()
		addr := m.client
		m.mu.Unlock()
		conn, err := dial(addr)
		if err != nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		resp, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{})
		cancel()
		conn.Close()
		if err == nil && resp.Leader != 0 {
			for _, o := range s.nodes(place) {
				if o.id == fmt.Sprintf("%x", resp.Leader) {
					return o
				}
			}
		}
	}
	return nil
}

// run starts the process; await waits until it serves.
func (m *member) run(dir string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	serving := make(chan struct{})
	m.serving = serving
	var err error
	m.proc, err = startEtcd(m.spec, dir, m.log, func(says etcdSays) {
		m.mu.Lock()
		m.id, m.client, m.disk = says.ID, says.Client, says.Disk
		m.mu.Unlock()
		m.peer.point(says.Peer)
		for _, r := range m.in {
			r.point(says.Client)
		}
		if says.Ready {
			close(serving)
		}
	})
	return err
}

func (m *member) await() error { return awaitServing(m.spec.Name, m.serving, m.proc, m.log) }

// kill ends the process; its data stay.
func (m *member) kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.proc.kill()
}

// wipe removes the data of a process that has ended.
func (m *member) wipe() error { return os.RemoveAll(m.spec.Dir) }

func (m *member) signal(sig syscall.Signal) error { return m.proc.signal(sig) }

func (p *proxy) run() error {
	serving := make(chan struct{})
	p.serving = serving
	var err error
	p.proc, err = startSpindle(p.name, p.dir, p.log, func(addr string) {
		p.in.point(addr)
		close(serving)
	}, p.args...)
	return err
}

func (p *proxy) await() error { return awaitServing(p.name, p.serving, p.proc, p.log) }

func awaitServing(name string, serving <-chan struct{}, proc *process, log *lineLog) error {
	select {
	case <-serving:
		return nil
	case <-proc.done:
		return fmt.Errorf("%s has ended:\n%s", name, log)
	case <-time.After(serveTimeout):
		return fmt.Errorf("%s does not serve after %v:\n%s", name, serveTimeout, log)
	}
}

// dial makes a connection that comes back soon after whatever was at the other end.
func dial(addr string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: 200 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(64<<20)))
}
