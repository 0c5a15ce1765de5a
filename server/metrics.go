package server

import (
	"fmt"
	"sync/atomic"

	"github.com/VictoriaMetrics/metrics"

	"spindle/codec"
)

// The server's metrics, all of them. Counters are made before they are needed, so that counting is one
// atomic addition. They belong to the process, like the registry they are in.
var (
	metricConns        = metrics.NewCounter(`spindle_client_connections_total`)
	metricConnsRefused = metrics.NewCounter(`spindle_client_connections_refused_total`) // over Config.MaxConns, or for want of descriptors
	metricConnsDropped = metrics.NewCounter(`spindle_client_connections_dropped_total`) // did not read, or gave no window
	metricBytesIn      = metrics.NewCounter(`spindle_client_received_bytes_total`)
	metricBytesOut     = metrics.NewCounter(`spindle_client_sent_bytes_total`)
	metricRefused      = metrics.NewCounter(`spindle_requests_refused_total`) // over a connection's limits
	// keep-alives without an answer, because their lease's home did not give one
	metricKeepAlivesLost = metrics.NewCounter(`spindle_lease_keepalives_lost_total`)
	metricPanics         = metrics.NewCounter(`spindle_panics_total`)

	_ = gaugeOf(`spindle_client_connections`, &connsOpen)
	_ = gaugeOf(`spindle_client_connections_blocked`, &connsBlocked)
	_ = gaugeOf(`spindle_client_streams`, &streamsOpen)
)

// Names with labels.
const (
	nameRequests       = `spindle_requests_total{method=%q,code=%q}`
	nameRequestSeconds = `spindle_request_duration_seconds{method=%q}`
	nameLoopTurns      = `spindle_loop_turns_total{loop="%d"}`
)

// What the gauges show.
var connsOpen, connsBlocked, streamsOpen atomic.Int64

func gaugeOf(name string, v *atomic.Int64) *metrics.Gauge {
	return metrics.NewGauge(name, func() float64 { return float64(v.Load()) })
}

func requestCounter(method string, code codec.Code) *metrics.Counter {
	return metrics.GetOrCreateCounter(fmt.Sprintf(nameRequests, method, codeNames[code]))
}

func requestSeconds(method string) *metrics.Histogram {
	return metrics.GetOrCreateHistogram(fmt.Sprintf(nameRequestSeconds, method))
}

func loopTurns(loop int) *metrics.Counter {
	return metrics.GetOrCreateCounter(fmt.Sprintf(nameLoopTurns, loop))
}

// codeNames are the names of gRPC's codes, as etcd's own metrics have them.
var codeNames = [...]string{
	codec.OK: "OK", codec.Canceled: "Canceled", codec.Unknown: "Unknown",
	codec.InvalidArgument: "InvalidArgument", codec.DeadlineExceeded: "DeadlineExceeded",
	codec.NotFound: "NotFound", codec.AlreadyExists: "AlreadyExists",
	codec.PermissionDenied: "PermissionDenied", codec.ResourceExhausted: "ResourceExhausted",
	codec.FailedPrecondition: "FailedPrecondition", codec.Aborted: "Aborted",
	codec.OutOfRange: "OutOfRange", codec.Unimplemented: "Unimplemented", codec.Internal: "Internal",
	codec.Unavailable: "Unavailable", codec.DataLoss: "DataLoss", codec.Unauthenticated: "Unauthenticated",
}
