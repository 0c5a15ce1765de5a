package embedded

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// What the members are started with. Spindle's batches need more than etcd's defaults of 128 operations
// and 1.5 MiB: a batch is one Txn, and it must take the largest request that a client may send.
const (
	MaxTxnOps       = 1024
	MaxRequestBytes = 1536*1024 + 64*1024
	QuotaBytes      = 8 << 30 // etcd's own recommended upper limit
	MaxShards       = 64      // more members than that in one process serve nobody
)

// A single node elects itself, so its timers only decide how long a start takes.
const (
	heartbeatMs  = 20
	electionMs   = 200
	readyTimeout = 60 * time.Second // a slow disk replays a large log
)

// anyPort asks the kernel for a free port. It also is the members' advertised peer URL: nobody dials it,
// and being constant it does not change over restarts.
const anyPort = "http://127.0.0.1:0"

// Config says what to start.
type Config struct {
	// Dir holds everything; it is made when it is missing.
	Dir string
	// Shards is the number of member clusters, 1 to MaxShards; fixed by the first start in Dir.
	Shards int
	// Log receives what the members complain about (errors only). Nil drops it.
	Log *slog.Logger
	// NoFsync makes the members forget to sync their logs. For tests only: a crash of the machine loses
	// data, a crash of the process does not.
	NoFsync bool
	// DefaultLimits starts the members with etcd's own default limits for the size of a Txn and of a
	// request. For tests.
	DefaultLimits bool
	// Quota is each member's, in bytes; 0 is QuotaBytes. For tests.
	Quota int64
	// TLS, if not nil, makes the members and the coordinator serve their clients with TLS only. For tests.
	TLS *TLS
}

// TLS is the files that members serve with: their certificate, and the CAs of the certificates that they demand of
// every client ("" demands none).
type TLS struct {
	CertFile, KeyFile, TrustedCAFile string
}

// Members are running member clusters. The fields are fixed from Start on.
type Members struct {
	// Shards holds the client URL of each member cluster, Names their names ("shard-1", ...).
	Shards []string
	Names  []string
	// Coordinator is the client URL of the coordinator.
	Coordinator string

	dir   *dir
	etcds []*embed.Etcd // shards, then the coordinator

	failed    chan error
	closed    chan struct{}
	closing   atomic.Bool // the members' complaints are not news any more
	closeOnce sync.Once
}

// Start starts all members and returns when every one serves. An error is one sentence that says what to
// do; nothing is left running then.
func Start(cfg Config) (*Members, error) {
	if cfg.Shards < 1 || cfg.Shards > MaxShards {
		return nil, fmt.Errorf("--embedded-shards %d: give a number from 1 to %d", cfg.Shards, MaxShards)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	d, err := openDir(cfg.Dir, cfg.Shards)
	if err != nil {
		return nil, err
	}
	m := &Members{dir: d, failed: make(chan error, 1), closed: make(chan struct{})}

	names := make([]string, 0, cfg.Shards+1)
	for i := range cfg.Shards {
		names = append(names, shardDir(i))
	}
	names = append(names, coordinatorDir)

	m.etcds = make([]*embed.Etcd, len(names))
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() { m.etcds[i], errs[i] = startMember(cfg, name, &m.closing) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil { // one is enough: they mostly fail for the same reason
			m.Close()
			return nil, err
		}
	}
	for i, e := range m.etcds {
		u := e.Config().ListenClientUrls[0].Scheme + "://" + e.Clients[0].Addr().String()
		if i < cfg.Shards {
			m.Shards, m.Names = append(m.Shards, u), append(m.Names, names[i])
		} else {
			m.Coordinator = u
		}
		go m.watch(names[i], e)
	}
	if !d.state.Complete {
		d.state.Complete = true
		if err := d.save(); err != nil {
			m.Close()
			return nil, err
		}
	}
	return m, nil
}

// startMember starts one etcd and waits until it serves.
func startMember(cfg Config, name string, closing *atomic.Bool) (*embed.Etcd, error) {
	c := embed.NewConfig()
	c.Name = name
	c.Dir = filepath.Join(cfg.Dir, name)
	peer, client := mustURL(anyPort), mustURL(anyPort)
	if cfg.TLS != nil {
		client.Scheme = "https"
		c.ClientTLSInfo.CertFile, c.ClientTLSInfo.KeyFile = cfg.TLS.CertFile, cfg.TLS.KeyFile
		c.ClientTLSInfo.TrustedCAFile, c.ClientTLSInfo.ClientCertAuth = cfg.TLS.TrustedCAFile, cfg.TLS.TrustedCAFile != ""
	}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	c.InitialCluster = name + "=" + anyPort
	c.InitialClusterToken = randomToken()
	c.EnableGRPCGateway = false
	c.TickMs, c.ElectionMs = heartbeatMs, electionMs
	c.QuotaBackendBytes = QuotaBytes
	if cfg.Quota != 0 {
		c.QuotaBackendBytes = cfg.Quota
	}
	c.UnsafeNoFsync = cfg.NoFsync
	if !cfg.DefaultLimits {
		c.MaxTxnOps, c.MaxRequestBytes = MaxTxnOps, MaxRequestBytes
	}
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapTo(cfg.Log.With("member", name), closing))

	e, err := embed.StartEtcd(c)
	if err != nil {
		return nil, fmt.Errorf("cannot start the embedded member %s in %s: %w", name, c.Dir, err)
	}
	timeout := time.NewTimer(readyTimeout)
	defer timeout.Stop()
	select {
	case <-e.Server.ReadyNotify():
		return e, nil
	case err = <-e.Err():
	case <-e.Server.StopNotify():
		err = errors.New("it stopped")
	case <-timeout.C:
		err = fmt.Errorf("it does not serve after %v", readyTimeout)
	}
	e.Close()
	return nil, fmt.Errorf("cannot start the embedded member %s in %s: %w", name, c.Dir, err)
}

// watch reports a member that died by itself.
func (m *Members) watch(name string, e *embed.Etcd) {
	var err error
	select {
	case <-m.closed:
		return
	case err = <-e.Err():
	case <-e.Server.StopNotify():
		err = errors.New("it stopped")
	}
	select {
	case <-m.closed:
	case m.failed <- fmt.Errorf("the embedded member %s has failed: %w", name, err):
	default: // another one was first
	}
}

// Failed delivers at most one error, when a member has died by itself.
func (m *Members) Failed() <-chan error { return m.failed }

// Etcd returns the running etcd of shard i, or of the coordinator for i == len(Shards). For tests that
// look behind the proxy or stop a member.
func (m *Members) Etcd(i int) *embed.Etcd { return m.etcds[i] }

// Close stops all members and gives the directory free. Clients should be gone before: a member waits
// some seconds for streams that are open. It may be called more than once.
func (m *Members) Close() {
	m.closeOnce.Do(func() {
		close(m.closed)
		m.closing.Store(true)
		var wg sync.WaitGroup
		for _, e := range m.etcds {
			if e != nil {
				wg.Go(e.Close)
			}
		}
		wg.Wait()
		m.dir.close()
	})
}

func mustURL(s string) url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err) // a constant
	}
	return *u
}

// randomToken gives a new member cluster an ID of its own: etcd derives it from the token, the name and
// the peer URLs. It counts at the first start only.
func randomToken() string {
	var b [16]byte
	rand.Read(b[:])
	return "spindle-" + hex.EncodeToString(b[:])
}
