// Package load drives an etcd endpoint with the requests of Kubernetes and measures what comes back.
//
// Many logical clients share few connections. A client has one request under way; its next one is chosen by
// the weights of the mix. In a closed loop it goes out when the last one is answered; in an open loop requests are
// due at fixed times, and latency counts from then, also while no client was free to send it. Nothing is
// allocated for a request. Every load ends by itself.
package load

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Work is a kind of work that a mix is made of.
type Work string

// The kinds of work; Works says what each is.
const (
	Create    Work = "create"
	Update    Work = "update"
	Get       Work = "get"
	List      Work = "list"
	Page      Work = "page"
	Stream    Work = "stream"
	Heartbeat Work = "heartbeat"
	Event     Work = "event"
	Pod       Work = "pod"
	Idle      Work = "idle"
)

// Works are all kinds of work.
var Works = []struct {
	Work Work
	What string
}{
	{Create, "new pods"},
	{Update, "compare-and-swap of one of the --keys pods that exist"},
	{Get, "linearizable read of one of them"},
	{List, "consistent list of all pods, one Range"},
	{Page, "the same in pages of --page at one revision, all of them together one request"},
	{Stream, "the same, one RangeStream (etcd 3.7, Spindle)"},
	{Heartbeat, "compare-and-swap of a node's Lease object"},
	{Event, "new objects with an etcd lease, a thousand on each"},
	{Pod, "a pod's life: created, changed four times, deleted"},
	{Idle, "nothing: watches only"},
}

// Share is one part of a mix.
type Share struct {
	Work   Work
	Weight int
}

// Mix says which work is done, and how often in relation to the others.
type Mix []Share

// ParseMix reads "create", or "get=8,update=3,create=1".
func ParseMix(s string) (Mix, error) {
	var m Mix
	for part := range strings.SplitSeq(s, ",") {
		name, weight, has := strings.Cut(strings.TrimSpace(part), "=")
		sh := Share{Work(name), 1}
		if has {
			n, err := strconv.Atoi(weight)
			if err != nil || n < 1 || n > 1<<20 {
				return nil, fmt.Errorf("%q: the weight of %s must be a number from 1 to %d", s, name, 1<<20)
			}
			sh.Weight = n
		}
		var names []string
		for _, w := range Works {
			names = append(names, string(w.Work))
		}
		if !slices.Contains(names, name) {
			return nil, fmt.Errorf("there is no work %q; there is %s", name, strings.Join(names, ", "))
		}
		m = append(m, sh)
	}
	if len(m) > 1 && m.has(Idle) {
		return nil, fmt.Errorf("%q: idle stands alone", s)
	}
	return m, nil
}

func (m Mix) String() string {
	if len(m) == 1 {
		return string(m[0].Work)
	}
	var parts []string
	for _, s := range m {
		parts = append(parts, fmt.Sprintf("%s=%d", s.Work, s.Weight))
	}
	return strings.Join(parts, ",")
}

func (m Mix) has(ws ...Work) bool {
	for _, s := range m {
		for _, w := range ws {
			if s.Work == w {
				return true
			}
		}
	}
	return false
}

// MarshalText and UnmarshalText are the form of ParseMix.
func (m Mix) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *Mix) UnmarshalText(b []byte) (err error) {
	*m, err = ParseMix(string(b))
	return err
}

// Spec is one load.
type Spec struct {
	Endpoints   []string // URLs; connections go to them in turn
	Mix         Mix
	Clients     int           // logical clients
	Connections int           // that they share
	Rate        float64       // requests per second, all clients together; 0: closed loop
	Warmup      time.Duration // not measured
	Duration    time.Duration // measured
	ValueSize   int           // bytes
	Keys        int           // objects that exist before the load begins (raised to Clients where each needs one)
	KeysExist   bool          // they are there, of an earlier load: not looked for again (reads only)
	PageSize    int           // keys in a page
	Prefix      string        // of all keys, ends with a slash
	NameSpread  int           // new objects' names are longer by 0 to NameSpread-1 bytes, evenly; 0: all are of one length
	Seed        uint64        // of the choices

	// WatchAll adds one watch of everything with prev_kv on a connection of its own, as an apiserver has.
	WatchAll bool
	// Watchers watch all pods, each with a stream of its own, on WatchConnections connections.
	Watchers         int
	WatchConnections int

	// Processes are measured besides.
	Processes []Process

	TLS *tls.Config `json:"-"`
	// User is who the requests are from; "": nobody says so. A token that expires on the way is not asked for again (one
	// of etcd's default kind lives as long as it is used).
	User     string `json:",omitempty"`
	Password string `json:"-"`
}

// Process is a server whose CPU and memory are reported.
type Process struct {
	Name string
	PID  int
}

const (
	maxClients     = 1 << 16
	maxConnections = 1 << 14
	maxValueSize   = 1 << 20
	maxKeys        = 1 << 26
	maxNameSpread  = len(filler)
	maxDuration    = 24 * time.Hour
)

// Default is a small load of creates.
func Default() Spec {
	return Spec{
		Endpoints: []string{"http://127.0.0.1:2379"}, Mix: Mix{{Create, 1}}, Clients: 256, Connections: 8,
		Warmup: 2 * time.Second, Duration: 10 * time.Second, ValueSize: 512, Keys: 10000, PageSize: 500,
		Prefix: "/registry/", Seed: 1, WatchConnections: 8,
	}
}

func between(name string, v, lo, hi int) error {
	if v < lo || v > hi {
		return fmt.Errorf("%s %d: give a number from %d to %d", name, v, lo, hi)
	}
	return nil
}

// endpoint takes the URL of a server apart: http://10.0.3.1:2379 or https://[::1]:2379.
func endpoint(s string) (address string, secure bool, err error) {
	u, err := url.Parse(s)
	if err == nil {
		_, port, _ := net.SplitHostPort(u.Host)
		n, _ := strconv.Atoi(port)
		if (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != "" && 0 < n && n < 1<<16 && strings.TrimSuffix(s, "/") == u.Scheme+"://"+u.Host {
			return u.Host, u.Scheme == "https", nil
		}
	}
	return "", false, fmt.Errorf("--endpoints %q: must be like http://127.0.0.1:2379, or https://127.0.0.1:2379 with TLS", s)
}

// Validate says what is wrong with s, and fills what follows from the rest.
func (s *Spec) Validate() error {
	if len(s.Endpoints) == 0 || len(s.Mix) == 0 {
		return errors.New("a load needs an endpoint and a workload")
	}
	for _, e := range s.Endpoints {
		if _, _, err := endpoint(e); err != nil {
			return err
		}
	}
	s.Connections = min(s.Connections, max(s.Clients, 1))
	s.WatchConnections = min(s.WatchConnections, max(s.Watchers, 1))
	if s.Mix.has(Update, Heartbeat) {
		s.Keys = max(s.Keys, s.Clients)
	}
	err := errors.Join(
		between("--clients", s.Clients, 1, maxClients),
		between("--connections", s.Connections, 1, maxConnections),
		between("the spread of names", s.NameSpread, 0, maxNameSpread),
		between("--value-size", s.ValueSize, stampSize, maxValueSize),
		between("--keys", s.Keys, 1, maxKeys),
		between("--page", s.PageSize, 1, maxKeys),
		between("--watchers", s.Watchers, 0, maxClients),
		between("--watch-connections", s.WatchConnections, 1, maxConnections))
	if err != nil {
		return err
	}
	if s.Mix.has(Idle) && s.Watchers == 0 && !s.WatchAll {
		return errors.New("--workload idle: there is nothing to measure without --watchers or --watch-all")
	}
	if s.KeysExist && s.Mix.has(Update, Heartbeat) {
		return errors.New("updates must know the revisions of the objects: they cannot take them for granted")
	}
	if s.Rate < 0 || s.Rate > 1e8 {
		return fmt.Errorf("--rate %g: requests per second, 0 for a closed loop", s.Rate)
	}
	if s.Duration <= 0 || s.Duration > maxDuration || s.Warmup < 0 || s.Warmup > maxDuration {
		return fmt.Errorf("--duration %v and --warmup %v must be positive, and at most %v", s.Duration, s.Warmup, maxDuration)
	}
	if !strings.HasSuffix(s.Prefix, "/") {
		return fmt.Errorf("--prefix %q must end with a slash", s.Prefix)
	}
	return nil
}
