package node

import (
	"log/slog"
	"time"

	"spindle/codec/tlsconn"
	"spindle/shard"
)

// Config describes one proxy. Zero values of what is not said to be needed take the defaults of the
// packages that they are for.
type Config struct {
	// ListenClientURLs are where the etcd API is served, one at least. Port 0 lets the kernel choose.
	ListenClientURLs []string
	// AdvertiseClientURLs are what Cluster.MemberList shows; default: what is listened on, with this
	// machine's name for "all addresses".
	AdvertiseClientURLs []string
	// ListenMetricsURLs are where /metrics and the health checks are served; may be empty.
	ListenMetricsURLs []string
	// EnablePprof serves Go's profiles there too, under /debug/pprof/.
	EnablePprof bool

	// TLS is what the URLs above with https or unixs are served with; nil without any.
	TLS *tlsconn.ServerFiles
	// MemberTLS is for endpoints with https or unixs; nil: the system's CAs, and no certificate of our own.
	MemberTLS *tlsconn.ClientFiles

	// Shards are the member clusters, one at least, Coordinator the endpoints of the coordinator.
	Shards      []Shard
	Coordinator []string
	// AcceptDataLoss names shards that may be behind what was seen of them.
	AcceptDataLoss []string
	// ReplaceCoordinator lets an empty coordinator take the place of the one that the partition map names.
	ReplaceCoordinator bool
	// Partition is what the configuration says about where keys lie; Member is a place in Shards.
	Partition shard.PartitionSpec
	// AutoCompact compacts without being asked; the zero value does not.
	AutoCompact shard.AutoCompact
	// ShardMaxTxnOps and ShardMaxRequestBytes are what the members were started with.
	ShardMaxTxnOps       int
	ShardMaxRequestBytes int
	// ShardQuotaBackendBytes is the quota of members that do not report theirs (etcd 3.5); 0: it is not known.
	ShardQuotaBackendBytes int

	// What clients may do; see the options of the same names. MaxClientMemory 0: no limit, as
	// GRPCKeepaliveInterval 0 means no pings.
	MaxRequestBytes       int
	MaxConcurrentStreams  int
	MaxClientMemory       int64
	GRPCKeepaliveMinTime  time.Duration
	GRPCKeepaliveInterval time.Duration
	GRPCKeepaliveTimeout  time.Duration

	// Name of this proxy in Cluster.MemberList; default: the host's.
	Name string
	// Version of Spindle, for /version.
	Version string

	Loops            int           // event loops; 0: half the cores, at least one
	BusyPoll         time.Duration // how long an idle loop looks for its next event before it sleeps; 0: not at all
	RingSize         int           // revisions held in memory for watches
	RingBytes        int64         // and the bytes that their events may take
	ReorderWindow    time.Duration // see --reorder-window
	ShardTimeout     time.Duration // see --shard-timeout
	ProgressInterval time.Duration // see --watch-progress-notify-interval

	Log *slog.Logger
}

// Shard is one member cluster: its name and the client URLs of its nodes.
type Shard struct {
	Name string
	URLs []string
}
