package server

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/VictoriaMetrics/metrics"

	"spindle/codec"
	"spindle/shard"
)

// routes finds what to do with a request by its :path. It is complete before the first client is let in
// and only read afterwards, by all loops.
type routes struct {
	byPath   map[string]*route
	services map[string]bool
	unknown  *route
}

type routeKind uint8

const (
	routeRefused routeKind = iota // known to etcd, not built here; or not known at all
	routeUnary
	routeStream
)

// route is one gRPC method.
type route struct {
	kind      routeKind
	op        shard.OpKind // of routeUnary
	newStream NewStream    // of routeStream
	path      string       // empty for the unknown
	refusal   codec.Status // of routeRefused: what is said instead of "not built"

	// Metrics, made when the route is, so that counting allocates nothing.
	requests [codec.Unauthenticated + 1]*metrics.Counter
	seconds  *metrics.Histogram
}

// service is one gRPC service of etcd, as it stands in the files kv.go, maintenance.go and so on.
type service struct {
	name    string // with its package
	methods []method
}

// method is one RPC of a service. Without an op it is refused, unless HandleStream gives it a handler.
type method struct {
	name    string
	op      *shard.OpKind
	refusal codec.Status
}

func unary(name string, op shard.OpKind) method        { return method{name: name, op: &op} }
func refused(name string, refusal codec.Status) method { return method{name: name, refusal: refusal} }
func notBuilt(name string) method                      { return method{name: name} }

// services is all that an etcd 3.7 server registers.
var services = []service{
	kvService, watchService, leaseService, clusterService, maintenanceService, authService,
	lockService, electionService, healthService,
}

func newRoutes() routes {
	t := routes{byPath: make(map[string]*route), services: make(map[string]bool), unknown: newRoute("")}
	for _, s := range services {
		t.services[s.name] = true
		for _, m := range s.methods {
			r := newRoute("/" + s.name + "/" + m.name)
			r.refusal = m.refusal
			if m.op != nil {
				r.kind, r.op = routeUnary, *m.op
			}
			t.byPath[r.path] = r
		}
	}
	return t
}

func newRoute(path string) *route {
	r := &route{path: path}
	label := strings.TrimPrefix(path, "/")
	if label == "" {
		label = "unknown"
	}
	for code := range r.requests {
		r.requests[code] = requestCounter(label, codec.Code(code))
	}
	r.seconds = requestSeconds(label)
	return r
}

// stream makes path a streaming method served by f.
func (t *routes) stream(path string, f NewStream) {
	r := t.byPath[path]
	if r == nil {
		r = newRoute(path)
		t.byPath[path] = r
		if service, _, ok := splitPath(path); ok {
			t.services[service] = true
		}
	}
	r.kind, r.newStream = routeStream, f
}

func (t *routes) find(path string) *route {
	if r := t.byPath[path]; r != nil {
		return r
	}
	return t.unknown
}

// refuse is the answer to a request for something that is not served. For what etcd does not know
// either, the texts are grpc-go's (Server.handleStream).
func (t *routes) refuse(r *route, path string) codec.Status {
	st := codec.Status{Code: codec.Unimplemented}
	service, name, ok := splitPath(path)
	switch {
	case r.refusal.Code != codec.OK:
		return r.refusal
	case r != t.unknown:
		st.Msg = "spindle: " + strings.TrimPrefix(path, "/") + " is not built yet"
	case !ok:
		st.Msg = "malformed method name: " + strconv.Quote(shown(path))
	case !t.services[service]:
		st.Msg = "unknown service " + shown(service)
	default:
		st.Msg = fmt.Sprintf("unknown method %s for service %s", shown(name), shown(service))
	}
	return st
}

// maxShown is how many bytes of a name are repeated to the client. A :path in its header table costs the client
// one byte a request; a whole one would make small requests into large answers.
const maxShown = 256

func shown(s string) string { return s[:min(len(s), maxShown)] }

// splitPath takes "/service/method" apart as grpc-go does: the service may hold further slashes.
func splitPath(path string) (service, method string, ok bool) {
	rest, ok := strings.CutPrefix(path, "/")
	i := strings.LastIndexByte(rest, '/')
	if !ok || i < 0 {
		return "", "", false
	}
	return rest[:i], rest[i+1:], true
}

// count notes that an RPC ended with code after ns nanoseconds.
func (r *route) count(code codec.Code, ns int64) {
	if int(code) >= len(r.requests) {
		code = codec.Unknown
	}
	r.requests[code].Inc()
	if r.kind == routeUnary {
		r.seconds.Update(float64(ns) / 1e9)
	}
}
