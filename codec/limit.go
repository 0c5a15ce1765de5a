package codec

// Limit names a bound that a peer ran into. ConnConfig.OnLimit hears of each; the numbers are in limits.go.
type Limit uint8

// The bounds of a connection. Those up to LimitProtocol end the connection, the others a stream or a request.
const (
	LimitResets        Limit = iota // streams that ended by RST_STREAM, of either side
	LimitIdleFrames                 // frames without use
	LimitControl                    // replies that wait for the socket
	LimitContinuations              // CONTINUATION frames of one header block
	LimitHeaderBlock                // bytes of one header block on the wire
	LimitPings                      // PINGs more often than ConnConfig.PingMinTime
	LimitProtocol                   // any other violation of RFC 9113 or RFC 7541 that ends a connection
	LimitHeaderList                 // decoded size or number of header fields: 431
	LimitStreams                    // MaxConcurrentStreams: REFUSED_STREAM
	LimitMessage                    // MaxMessageBytes, compressed or not: ResourceExhausted
	LimitPartial                    // messages received in part: ResourceExhausted
	LimitInflate                    // bytes that gzip may give in a second: ResourceExhausted
	LimitQueue                      // MaxQueuedBytes: the stream is reset
	LimitCount
)

var limitNames = [LimitCount]string{
	LimitResets: "resets", LimitIdleFrames: "idle_frames", LimitControl: "control_replies",
	LimitContinuations: "continuations", LimitHeaderBlock: "header_block", LimitPings: "pings",
	LimitProtocol: "protocol_errors", LimitHeaderList: "header_list", LimitStreams: "streams",
	LimitMessage: "message_bytes", LimitPartial: "partial_messages", LimitInflate: "inflated_bytes",
	LimitQueue: "queued_bytes",
}

// String is the limit's name, as it stands in metrics.
func (l Limit) String() string { return limitNames[l] }

// limitErr ends the connection for a bound.
func limitErr(l Limit, reason string) error {
	return &ConnError{Code: uint32(h2EnhanceYourCalm), Reason: reason, Limit: l}
}

// hit reports that the peer ran into l.
func (c *Conn) hit(l Limit) {
	if c.cfg.OnLimit != nil {
		c.cfg.OnLimit(l)
	}
}
