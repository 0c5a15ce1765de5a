package shard

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"spindle/codec"
	"spindle/codec/tlsconn"

	"github.com/VictoriaMetrics/metrics"
)

// endpointAddr is a parsed endpoint URL.
type endpointAddr struct {
	network   string // "tcp" or "unix"
	address   string // for net.Dial
	authority string // for :authority
	// server is what the certificate must be for, "" without TLS: the host, and as clientv3 has it the last
	// part of a socket's path.
	server string
}

// parseEndpoint reads http://host:port, unix:///path and (relative, as etcd has it) unix://path; with TLS they
// begin with https and unixs.
func parseEndpoint(s string) (endpointAddr, error) {
	for _, scheme := range [...]string{"unix:", "unixs:"} {
		p, ok := strings.CutPrefix(s, scheme)
		if !ok {
			continue
		}
		p = strings.TrimPrefix(p, "//")
		if p == "" {
			return endpointAddr{}, fmt.Errorf("endpoint %q: no socket path", s)
		}
		addr := endpointAddr{network: "unix", address: p, authority: "localhost"}
		if scheme == "unixs:" {
			addr.server = path.Base(p)
		}
		return addr, nil
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return endpointAddr{}, fmt.Errorf("endpoint %q: not a URL: %w", s, errors.Unwrap(err))
	case u.Scheme != "http" && u.Scheme != "https":
		return endpointAddr{}, fmt.Errorf("endpoint %q: want http://host:port, https://host:port or unix:///path", s)
	case u.Hostname() == "" || u.Port() == "":
		return endpointAddr{}, fmt.Errorf("endpoint %q: want a host and a port", s)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || (u.Path != "" && u.Path != "/"):
		return endpointAddr{}, fmt.Errorf("endpoint %q: nothing may follow the port, or stand before the host", s)
	}
	addr := endpointAddr{network: "tcp", address: u.Host, authority: u.Host}
	if u.Scheme == "https" {
		addr.server = u.Hostname()
	}
	return addr, nil
}

// poolEndpoint is one endpoint of a cluster, with the slots for its connections. Owned by the loop.
type poolEndpoint struct {
	pool    *Pool
	cluster *poolCluster
	url     string
	addr    endpointAddr
	slots   []*poolSlot
	gone    bool // removed: it is not dialed any more

	ready   int       // links that may take streams
	looked  bool      // a look at it has come back, and it did not pass
	lastErr string    // why the newest attempt or connection failed; "" after success
	since   time.Time // of the present state
	told    endpointState
	cause   string // what toldDown said
	gauge   *metrics.Counter

	bad          int   // answers in a row that tell of a missing quorum
	penaltyUntil int64 // 0 for none
}

// notDialed is the LastError of an endpoint of which nothing is known yet.
const notDialed = "not dialed yet"

// endpointState is what the log was told last.
type endpointState uint8

const (
	toldNothing endpointState = iota
	toldUp
	toldDown
)

// EndpointStatus is the state of one endpoint.
type EndpointStatus struct {
	URL       string
	Connected bool
	// LastError is why the endpoint does not answer, "" while it does.
	LastError string
	// Since is when that state began.
	Since time.Time
}

func newPoolEndpoint(p *Pool, cl *poolCluster, u string) *poolEndpoint {
	ep := &poolEndpoint{pool: p, cluster: cl, url: u, since: time.Now(), gauge: cl.metrics.connected(u)}
	addr, err := parseEndpoint(u)
	if err != nil {
		ep.lastErr = err.Error()
		return ep
	}
	ep.addr, ep.lastErr = addr, notDialed
	for range p.cfg.ConnsPerEndpoint {
		s := &poolSlot{ep: ep}
		s.timer.owner = s
		ep.slots = append(ep.slots, s)
	}
	return ep
}

func (ep *poolEndpoint) start() {
	if len(ep.slots) == 0 {
		ep.pool.log.Error(ep.cluster.label + ": " + ep.lastErr)
		ep.told = toldDown
		return
	}
	for _, s := range ep.slots {
		s.dial()
	}
}

// stop forgets the dials; the Pool's context ends those under way.
func (ep *poolEndpoint) stop() {
	for _, s := range ep.slots {
		ep.pool.timers.cancel(&s.timer)
	}
}

// up says that a link became usable.
func (ep *poolEndpoint) up() {
	ep.ready++
	ep.looked = false
	ep.gauge.Inc()
	ep.cluster.metrics.connects.Inc()
	ep.lastErr = ""
	ep.bad, ep.penaltyUntil = 0, 0
	if ep.ready > 1 {
		return
	}
	ep.since = time.Now()
	if ep.told != toldUp {
		ep.told = toldUp
		ep.pool.log.Info(fmt.Sprintf("%s: endpoint %s answers", ep.cluster.label, ep.url))
	}
}

// left says that a usable link takes no new streams any more.
func (ep *poolEndpoint) left() {
	ep.ready--
	ep.gauge.Dec()
	ep.cluster.metrics.disconnects.Inc()
	if ep.ready == 0 {
		ep.since = time.Now()
		ep.lastErr = "connecting again"
		ep.cluster.describeDown()
	}
}

// failed says that a dial or a link failed. The log hears of it once, until the endpoint answers again, except for
// what TLS has to say.
func (ep *poolEndpoint) failed(err error) {
	if ep.ready > 0 || ep.pool.closed {
		return
	}
	why, certain := briefError(err), false
	if ep.addr.server != "" {
		if text := tlsconn.ExplainServer(err, ep.addr.server); text != "" {
			why, certain = text, true
		}
	}
	ep.lastErr = why
	ep.cluster.describeDown()
	// A member that comes back with a bad certificate is news, though it was down before.
	if ep.told != toldDown || certain && ep.cause != why {
		ep.told, ep.cause = toldDown, why
		ep.pool.log.Warn(fmt.Sprintf("%s: endpoint %s does not answer: %s; trying again", ep.cluster.label, ep.url, ep.lastErr))
	}
}

// describeDown says what calls get while no endpoint is connected.
func (cl *poolCluster) describeDown() {
	if cl.closed {
		cl.down = codec.Status{Code: codec.Unavailable, Msg: cl.label + ": the connections are closed"}
		return
	}
	var b strings.Builder
	b.WriteString(cl.label)
	b.WriteString(": no endpoint answers")
	for i, ep := range cl.endpoints {
		b.WriteString([2]string{" (", "; "}[min(i, 1)])
		b.WriteString(ep.url)
		b.WriteString(": ")
		b.WriteString(ep.lastErr)
	}
	if len(cl.endpoints) > 0 {
		b.WriteByte(')')
	}
	cl.down = codec.Status{Code: codec.Unavailable, Msg: b.String()}
}

// judge takes the outcome of a unary call.
func (ep *poolEndpoint) judge(st codec.Status) {
	if !cutOff(st) {
		if st.Code == codec.OK {
			ep.bad, ep.penaltyUntil = 0, 0
		}
		return
	}
	if ep.bad++; ep.bad >= penaltyAfter || st == codec.ErrNoLeader {
		ep.penalize()
	}
}

// penalize puts ep behind the cluster's other endpoints for a while.
func (ep *poolEndpoint) penalize() {
	// One more bad answer after the penalty renews it.
	ep.bad = penaltyAfter - 1
	ep.penaltyUntil = ep.pool.timers.now() + int64(penaltyTime)
	ep.cluster.metrics.penalties.Inc()
	ep.pool.log.Debug(fmt.Sprintf("%s: endpoint %s seems to be cut off from its quorum; preferring others for %v", ep.cluster.label, ep.url, penaltyTime))
}

func (ep *poolEndpoint) penalized(now int64) bool { return ep.penaltyUntil > now }

// Endpoints returns the state of a cluster's endpoints, in the configuration's order.
func (p *Pool) Endpoints(id codec.ClusterID) []EndpointStatus {
	cl := p.clusters[id]
	if cl == nil {
		return nil
	}
	list := make([]EndpointStatus, len(cl.endpoints))
	for i, ep := range cl.endpoints {
		list[i] = EndpointStatus{URL: ep.url, Connected: ep.ready > 0, LastError: ep.lastErr, Since: ep.since}
	}
	return list
}

// Unreachable says in one sentence which cluster does not answer, and why; "" if it does.
func (p *Pool) Unreachable(id codec.ClusterID) string {
	switch cl := p.clusters[id]; {
	case cl == nil:
		return fmt.Sprintf("cluster %d is not in the configuration", int(id))
	case len(cl.ready) > 0:
		return ""
	default:
		return cl.down.Msg
	}
}

// poolSlot is the place of one connection: it dials until it has a link, and again when that is lost. Owned by
// the loop.
type poolSlot struct {
	ep       *poolEndpoint
	link     *poolLink // nil while dialing or waiting
	old      *poolLink // serves until its successor, link, is ready, or is suspected; nil if none
	dialing  bool      // a goroutine dials
	attempts int       // failures in a row
	timer    poolTimer // the next dial
}

// dial begins an attempt on a goroutine of its own.
func (s *poolSlot) dial() {
	p := s.ep.pool
	if s.dialing { // for a second connection that was called off: it serves now
		return
	}
	s.dialing = true
	addr, patience := s.ep.addr, s.patience()
	go func() {
		d := net.Dialer{
			Timeout: patience,
			// Finds a dead peer of a connection without streams, which HTTP/2 pings leave alone.
			KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
		}
		nc, err := d.DialContext(p.ctx, addr.network, addr.address)
		if tc, ok := nc.(*net.TCPConn); ok {
			err = tc.SetNoDelay(true)
		}
		var secure *tls.Config
		if addr.server != "" && err == nil {
			secure = p.cfg.TLS.Config(addr.server)
		}
		p.loop.Post(func() { s.dialed(nc, secure, err) })
	}()
}

// dialed takes the socket of an attempt; secure is for TLS above it, nil for none.
func (s *poolSlot) dialed(nc net.Conn, secure *tls.Config, err error) {
	p := s.ep.pool
	s.dialing = false
	if p.closed || s.ep.gone || err != nil || s.link != nil {
		if nc != nil {
			_ = nc.Close() // nothing was sent on it
		}
		if s.link == nil { // else it was called off
			s.retry(err)
		}
		return
	}
	l := newPoolLink(s, secure)
	if err := p.loop.Enroll(nc, l); err != nil {
		s.retry(err)
		return
	}
	s.link = l
	if p.links = append(p.links, l); p.tick.place == 0 {
		p.timers.set(&p.tick, p.timers.now()+int64(codecTick))
	}
	p.timers.set(&l.timer, p.timers.now()+int64(s.patience()))
}

// retry waits and dials again: the wait doubles from BackoffMin to BackoffMax, and the upper half of it is random,
// so that proxies do not knock in step.
func (s *poolSlot) retry(err error) {
	p := s.ep.pool
	if p.closed || s.ep.gone {
		return
	}
	if err != nil {
		s.ep.failed(err)
	}
	wait := min(p.cfg.BackoffMax, p.cfg.BackoffMin<<min(s.attempts, 16))
	s.attempts++ // patience asks for it
	half := int64(wait) / 2
	p.timers.set(&s.timer, p.timers.now()+half+rand.Int64N(half+1))
}

// due is the end of the wait.
func (s *poolSlot) due(int64) {
	if !s.ep.pool.closed {
		s.dial()
	}
}

// briefError returns the part of a network error that tells an operator something; which endpoint it is about stands
// before it already.
func briefError(err error) string {
	var errno syscall.Errno
	var dns *net.DNSError
	switch {
	case errors.Is(err, syscall.EMFILE):
		return "too many open files in this process (see its limit)" // not the endpoint's fault
	case errors.As(err, &errno):
		return errno.Error()
	case errors.As(err, &dns):
		return dns.Error()
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return "timed out"
	case errors.Is(err, io.EOF):
		return "closed by the other side"
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		return op.Err.Error()
	}
	return err.Error()
}
