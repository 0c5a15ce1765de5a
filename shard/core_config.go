package shard

import (
	"log/slog"
	"math/rand/v2"
	"time"

	"spindle/revclock"
)

// CoreConfig is what a Core is made with. Zero durations and sizes take the defaults of NewCore.
type CoreConfig struct {
	// Proxy is this process's identity, random at every start.
	Proxy revclock.ID
	// Names are the member clusters' names, in the order of the transport's ClusterIDs.
	Names []string
	// Partition is what the configuration says about where keys lie.
	Partition PartitionSpec
	// AutoCompact compacts without being asked.
	AutoCompact AutoCompact
	// Now is the clock, in nanoseconds; it never runs backwards.
	Now func() int64
	// Rand is the source of jitter and of new identities. The simulation seeds it.
	Rand *rand.Rand
	Log  *slog.Logger

	// RingSize is the number of revisions held for watches, RingBytes what their events may weigh.
	RingSize  int
	RingBytes int64
	// ReorderWindow is how long another proxy's range may stay open before this proxy fences it.
	ReorderWindow time.Duration
	// ShardTimeout is how long a request waits for a shard (or the coordinator) before the client gets
	// etcd's "request timed out".
	ShardTimeout time.Duration

	// HistoryBytes is how much a History keeps of one shard before it holds that shard's stream back.
	HistoryBytes int

	// Memory bounds what large answers may take; nil: nothing does.
	Memory *Memory
	// Limits are enforced towards clients.
	Limits Limits
	// MemberMaxTxnOps and MemberMaxRequestBytes are what the members accept (etcd's --max-txn-ops and
	// --max-request-bytes): they bound a batch.
	MemberMaxTxnOps       int
	MemberMaxRequestBytes int
	// MemberQuotaBytes is the quota (etcd's --quota-backend-bytes) of members that do not report it; 0: none is known.
	MemberQuotaBytes int64

	// MemberName and ClientURLs are how this proxy shows itself in Cluster.MemberList.
	MemberName string
	ClientURLs []string

	// SnapshotEvery is the number of ticks between two snapshots on the coordinator.
	SnapshotEvery int

	// PageKeys and ChunkBytes are the size of a stream's first page of a shard, in keys, and what a chunk
	// of it is closed at. For tests: with fewer keys than the default nothing beyond a shard's share of a
	// limit is asked for either.
	PageKeys, ChunkBytes int
	// CreateEntries is the size of the cache of create revisions. For tests of many short-lived Cores.
	CreateEntries int

	// AlwaysAhead closes a batch behind the one that is away whenever something waits, whether that gains anything or not. For the
	// simulation.
	AlwaysAhead bool

	// ReplaceCoordinator lets a coordinator take the place of the one that the partition map names, although its
	// etcd has another cluster ID. It must be empty.
	ReplaceCoordinator bool

	// AcceptDataLoss names member clusters that may be behind what was seen of them.
	AcceptDataLoss []string

	// Sabotage plants bugs for the simulation to find. Never set outside of tests.
	Sabotage Sabotage
}

// Sabotage is a set of planted bugs; see shard/sim.
type Sabotage struct {
	// DropGuard leaves the clock guard out of batches.
	DropGuard bool
	// BareFlat leaves the requests' compares out of flat batches, FlatTwice sends a flat batch that failed again in its
	// nested form without its guard.
	BareFlat, FlatTwice bool
	// RetickWithoutLooking takes a new range for a rejected batch without looking for its record.
	RetickWithoutLooking bool
	// FrontierIgnoresRanges moves the frontier to N whatever ranges are open.
	FrontierIgnoresRanges bool
	// UnrecordedBehind gives what has no record the revision of the record before.
	UnrecordedBehind bool
	// KeepCopies does not revoke the copies of a lease that ended.
	KeepCopies bool
	// HistoryAhead lets a read of the past go on before every shard's stream has come there.
	HistoryAhead bool
	// CompactionUnread lets reads at a revision ignore the compaction record that they bring along.
	CompactionUnread bool
	// RebuildSkipsShard leaves a shard out of a rebuild. RebuildFencesFirst fences before the coordinator has the new
	// epoch, and believes that then. RebuildNoFence does not fence, and believes what the coordinator names.
	RebuildSkipsShard, RebuildFencesFirst, RebuildNoFence bool
	// NoSpaceUnapplied takes a member's answer that it is out of space for the proof that nothing was applied.
	NoSpaceUnapplied bool
	// CutOffNow lets a proxy that does not reach the coordinator go on with the epoch and the now that it knows.
	CutOffNow bool
	// DeadShardPassed moves the frontier of a shard without a live stream to N whatever ranges are open there.
	DeadShardPassed bool
	// WideAtNow reads the ranges behind a Txn at now, not at the Txn's revision.
	WideAtNow bool
	// RecentIgnoresRanges answers Gets from the ring whatever ranges are open.
	RecentIgnoresRanges bool
	// DoomedUnchecked believes that a Txn fails whose compare names the very revision that was seen last, and does not look.
	DoomedUnchecked bool
	// AheadUnsettled takes a batch whose reply was lost for void if another one is closed behind it; AheadUnread lets reads ignore the
	// range of that one.
	AheadUnsettled, AheadUnread bool
	// BlindIsVoid takes a batch for void whose record may be among those that the stream skipped.
	BlindIsVoid bool
	// Doubt is no bug: every Txn that may fail with a read is read first. Nothing may be wrong with that.
	Doubt bool
	// TrustConnections uses connections to members without looking where they lead, and batches and reads take what clock they find.
	TrustConnections bool
}
