package shard

import (
	"fmt"

	"spindle/codec"

	"github.com/VictoriaMetrics/metrics"
)

// The pool's metrics: names and labels.
var (
	metricPoolCalls      = `spindle_member_calls_total{cluster=%q,code=%q}`       // unary calls that ended, by gRPC code
	metricPoolInFlight   = `spindle_member_calls_in_flight{cluster=%q}`           // unary calls under way
	metricPoolConnects   = `spindle_member_connects_total{cluster=%q}`            // connections that became usable
	metricPoolDisconnect = `spindle_member_disconnects_total{cluster=%q}`         // usable connections that were lost
	metricPoolConnected  = `spindle_member_connected{cluster=%q,endpoint=%q}`     // usable connections now
	metricPoolPenalties  = `spindle_member_penalties_total{cluster=%q}`           // endpoints left for a while, being without a quorum
	metricPoolSentBytes  = `spindle_member_sent_bytes_total{cluster=%q}`          // written to sockets
	metricPoolRecvBytes  = `spindle_member_received_bytes_total{cluster=%q}`      // read from sockets
	metricPoolLimit      = `spindle_member_limit_hits_total{cluster=%q,limit=%q}` // bounds that a member ran into
	metricPoolDeadConns  = `spindle_member_ping_timeouts_total{cluster=%q}`       // connections closed as dead
)

// codeNames are the label values of codes (google.golang.org/grpc/codes).
var codeNames = [...]string{"OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound", "AlreadyExists",
	"PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted", "OutOfRange", "Unimplemented", "Internal",
	"Unavailable", "DataLoss", "Unauthenticated"}

// clusterMetrics are the counters of one cluster. Those by code are made when first counted, so that a page of
// metrics shows only the codes that occurred.
type clusterMetrics struct {
	set  *metrics.Set
	name string

	inFlight, connects, disconnects, penalties, sent, received, deadConns *metrics.Counter

	calls [len(codeNames)]*metrics.Counter
}

func newClusterMetrics(set *metrics.Set, name string) *clusterMetrics {
	counter := func(format string) *metrics.Counter { return set.GetOrCreateCounter(fmt.Sprintf(format, name)) }
	return &clusterMetrics{
		set:         set,
		name:        name,
		inFlight:    counter(metricPoolInFlight),
		connects:    counter(metricPoolConnects),
		disconnects: counter(metricPoolDisconnect),
		penalties:   counter(metricPoolPenalties),
		sent:        counter(metricPoolSentBytes),
		received:    counter(metricPoolRecvBytes),
		deadConns:   counter(metricPoolDeadConns),
	}
}

// hit counts a bound of the connection that the member ran into. It is rare, so the counter is made then.
func (m *clusterMetrics) hit(l codec.Limit) {
	m.set.GetOrCreateCounter(fmt.Sprintf(metricPoolLimit, m.name, l)).Inc()
}

// ended counts a call. Numbers that are no gRPC code count as Unknown.
func (m *clusterMetrics) ended(code codec.Code) {
	if int(code) >= len(m.calls) {
		code = codec.Unknown
	}
	c := m.calls[code]
	if c == nil {
		c = m.set.GetOrCreateCounter(fmt.Sprintf(metricPoolCalls, m.name, codeNames[code]))
		m.calls[code] = c
	}
	c.Inc()
}

// forget takes the gauge of an endpoint that was removed from the page.
func (m *clusterMetrics) forget(endpoint string) {
	m.set.UnregisterMetric(fmt.Sprintf(metricPoolConnected, m.name, endpoint))
}

// connected is the gauge of an endpoint's usable connections (a Counter, since several pools add to it).
func (m *clusterMetrics) connected(endpoint string) *metrics.Counter {
	return m.set.GetOrCreateCounter(fmt.Sprintf(metricPoolConnected, m.name, endpoint))
}
