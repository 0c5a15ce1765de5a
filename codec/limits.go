package codec

import "time"

// Limits of a connection that are not in ConnConfig. Each names the cost or attack that it bounds.
const (
	// defaultMaxConcurrentStreams is far above what clients of etcd open on one connection (they wait for
	// a free place beyond it), and bounds a connection to a few MiB of streams.
	defaultMaxConcurrentStreams = 10_000
	defaultStreamWindow         = 1 << 20
	defaultConnWindow           = 4 << 20
	// defaultMaxHeaderBytes holds any honest metadata (a bearer token included).
	defaultMaxHeaderBytes = 16 << 10
	// defaultMaxHeaderFields bounds the bookkeeping of fields that cost the sender one byte each
	// (CVE-2016-6581, CVE-2026-49975); clientv3 sends about ten.
	defaultMaxHeaderFields = 64
	// defaultMaxMessageBytes is etcd's: 1.5 MiB of request and 512 KiB of gRPC overhead.
	defaultMaxMessageBytes = 2 << 20
	defaultMaxQueuedBytes  = 64 << 20

	// hardQueueFactor times MaxQueuedBytes waiting on a connection ends the stream that sends more. A
	// message is refused by what already waits, not by its own size: one huge list still passes.
	hardQueueFactor = 4

	// maxFragmentFactor times MaxHeaderBytes is the most a header block may take on the wire, over all
	// its CONTINUATION frames (CVE-2024-27316). Beyond, the connection ends.
	maxFragmentFactor = 2
	// maxContinuations bounds the CONTINUATION frames of one header block.
	maxContinuations = 64

	// maxControlQueued bounds the replies (PING and SETTINGS acknowledgements, RST_STREAM) that wait for
	// the socket (CVE-2019-9512, 9515, 9514).
	maxControlQueued = 10_000

	// resetBurst is how many young streams may end by RST_STREAM, of either side, without having got a response
	// (Rapid Reset CVE-2023-44487, MadeYouReset CVE-2025-8671). Each stream that got a response gives one
	// back, and Tick gives resetRefill back.
	resetBurst  = 1000
	resetRefill = 100
	// freeResetTicks is the age, in Ticks, from which on a stream may be reset by the peer without taking from that:
	// MaxConcurrentStreams, with AddWork, bounds how many become so old.
	freeResetTicks = 2

	// idleFrameBurst is how many frames without use (empty DATA, PRIORITY, unknown types) may arrive
	// (CVE-2019-9513, 9518). Each message gives one back, each stream idlePerStream (frames that cross its
	// end are normal), Tick all.
	idleFrameBurst = 10_000
	idlePerStream  = 2
	// settingsCost is what a SETTINGS frame takes from that budget: it touches all streams.
	settingsCost = 10

	// maxAssemblingMessages times MaxMessageBytes (but at least the ConnWindow) is the most that messages
	// received in part may keep on one connection; a stream that needs more ends with ResourceExhausted.
	maxAssemblingMessages = 32

	// memberHaste: once this part of a reply is here (client role), memory for all of it is taken.
	memberHaste = 8

	// MaxSparedBytes bounds a message that is kept when nothing else is: many times what a member that divides its
	// messages (fragments of a watch) sends at once. A larger one is treated as any.
	MaxSparedBytes = 64 << 20

	// maxInflateBytes is how many bytes gzip may give on one connection between two Ticks (about a second). Further
	// compressed messages are answered with ResourceExhausted. One message goes beyond it at most.
	// All connections that share an InflateBudget have as much together, beyond ownInflateBytes of each, so that a
	// client that compresses little is served beside any number that do much.
	maxInflateBytes = 64 << 20
	ownInflateBytes = 1 << 20

	// maxPingStrikes is how many PINGs may come too early, pingIdleTime how far apart they have to be on a
	// connection without streams. Both are grpc-go's, so etcd's.
	maxPingStrikes = 2
	pingIdleTime   = 2 * time.Hour

	// maxPlainBody is how much of the body of a request that is not gRPC is swallowed before the answer.
	maxPlainBody = 64 << 10

	// maxStatusText bounds the encoded grpc-message, so that trailers always fit one frame.
	maxStatusText = 4 << 10

	// outputTarget is how much DATA one Output collects before the other streams, and the socket, get
	// their turn.
	outputTarget = 256 << 10
	// outputSlack is by how much more a message that has begun in an Output may end in it: what stays behind is copied once
	// more.
	outputSlack = 64 << 10

	// leadRoom is room for what SendParts puts before a body, minShared the size of one below which it is copied all
	// the same.
	leadRoom  = 64
	minShared = 4 << 10

	// clientStreamsBeforeSettings bounds Open until the server's SETTINGS are here (RFC 9113 6.5.2 advises
	// servers not to go below 100).
	clientStreamsBeforeSettings = 100

	// minOutput and smallFrame are sizes of memory for Output: at first, and free before a small frame.
	// maxOutHint bounds what the size of the last ones makes it begin with.
	minOutput  = 4 << 10
	smallFrame = 128
	maxOutHint = 2 * outputTarget

	// maxFreeStreams and the sizes below bound what an idle connection keeps for its next request.
	maxFreeStreams  = 256
	closedRingSize  = 32  // last ended streams, to tell late frames from wrong ones
	maxCachedBlock  = 512 // bytes of a header block remembered for the next request
	tickFreeStreams = 4   // streams kept when a Tick finds the connection idle
)

// DefaultConnConfig returns the bounds that zero fields of a ConnConfig take.
func DefaultConnConfig() ConnConfig {
	return ConnConfig{
		MaxConcurrentStreams: defaultMaxConcurrentStreams,
		StreamWindow:         defaultStreamWindow,
		ConnWindow:           defaultConnWindow,
		MaxHeaderBytes:       defaultMaxHeaderBytes,
		MaxHeaderFields:      defaultMaxHeaderFields,
		MaxMessageBytes:      defaultMaxMessageBytes,
		MaxQueuedBytes:       defaultMaxQueuedBytes,
	}
}

// withDefaults fills zero fields and cuts windows to what HTTP/2 can grant.
func (cfg ConnConfig) withDefaults() ConnConfig {
	d := DefaultConnConfig()
	if cfg.MaxConcurrentStreams == 0 {
		cfg.MaxConcurrentStreams = d.MaxConcurrentStreams
	}
	if cfg.StreamWindow == 0 {
		cfg.StreamWindow = d.StreamWindow
	}
	if cfg.ConnWindow == 0 {
		cfg.ConnWindow = d.ConnWindow
	}
	if cfg.MaxHeaderBytes <= 0 {
		cfg.MaxHeaderBytes = d.MaxHeaderBytes
	}
	if cfg.MaxHeaderFields <= 0 {
		cfg.MaxHeaderFields = d.MaxHeaderFields
	}
	if cfg.MaxMessageBytes <= 0 {
		cfg.MaxMessageBytes = d.MaxMessageBytes
	}
	if cfg.MaxQueuedBytes <= 0 {
		cfg.MaxQueuedBytes = d.MaxQueuedBytes
	}
	if cfg.FullBytes <= 0 {
		cfg.FullBytes = cfg.MaxMessageBytes
	}
	cfg.StreamWindow = min(cfg.StreamWindow, maxWindow)
	// RFC 9113 6.9.2: the connection's window begins at 65,535 and cannot be lowered by SETTINGS.
	cfg.ConnWindow = min(max(cfg.ConnWindow, initialWindow), maxWindow)
	if cfg.MaxPartialBytes <= 0 {
		cfg.MaxPartialBytes = max(maxAssemblingMessages*cfg.MaxMessageBytes, int(cfg.ConnWindow))
	}
	return cfg
}
