package server

import (
	"fmt"

	"github.com/VictoriaMetrics/metrics"

	"spindle/codec"
)

// limit is a bound of the server's own that a client ran into, beside those of codec.Limit. README's table of limits
// has them all, under the names of the metric.
type limit uint8

const (
	limitConns          limit = iota // Config.MaxConns
	limitDescriptors                 // none are left
	limitPreface                     // Config.GreetTimeout
	limitHandshakeTime               // tlsconn.HandshakeTimeout, or Config.GreetTimeout if that is shorter
	limitHandshakes                  // tlsconn.ErrCrowded
	limitHandshakeBytes              // tlsconn.ErrFlood
	limitTLSRecords                  // tlsconn.ErrRecords
	limitTLSErrors                   // what is no TLS, or is refused
	limitKeepalive                   // Config.KeepaliveTimeout
	limitStalled                     // Config.StallTimeout: the socket is not read
	limitNoWindow                    // Config.StallTimeout: no HTTP/2 window for answers
	limitBlockedControl              // maxBlockedControl
	limitMemory                      // Memory
	limitRequests                    // maxOpsPerConn
	limitAllRequests                 // maxOps
	limitRequestBytes                // maxOpBytesPerConn
	limitReplies                     // maxWaitingReplies
	limitWatches                     // watches and their keys: of a stream, of a connection, of all
	limitPendingCreates              // maxPendingCreates
	limitCount
)

var limitNames = [limitCount]string{
	limitConns: "connections", limitDescriptors: "descriptors", limitPreface: "preface_time", limitHandshakeTime: "handshake_time",
	limitHandshakes: "handshakes", limitHandshakeBytes: "handshake_bytes", limitTLSRecords: "tls_records", limitTLSErrors: "tls_errors", limitKeepalive: "keepalive", limitStalled: "stalled_reader",
	limitNoWindow: "no_window", limitBlockedControl: "blocked_control", limitMemory: "memory",
	limitRequests: "requests_in_flight", limitAllRequests: "all_requests_in_flight", limitRequestBytes: "request_bytes_in_flight", limitReplies: "waiting_replies",
	limitWatches: "watches", limitPendingCreates: "pending_creates",
}

const nameLimit = `spindle_client_limit_hits_total{limit=%q}`

// How often clients ran into each bound.
var (
	limitHits = newLimitCounters(limitNames[:])
	codecHits = func() []*metrics.Counter {
		names := make([]string, codec.LimitCount)
		for l := range names {
			names[l] = codec.Limit(l).String()
		}
		return newLimitCounters(names)
	}()
)

func newLimitCounters(names []string) []*metrics.Counter {
	out := make([]*metrics.Counter, len(names))
	for i, name := range names {
		out[i] = metrics.NewCounter(fmt.Sprintf(nameLimit, name))
	}
	return out
}

func hitLimit(l limit) { limitHits[l].Inc() }

// countLimit is the OnLimit of every client's codec.Conn.
func countLimit(l codec.Limit) { codecHits[l].Inc() }
