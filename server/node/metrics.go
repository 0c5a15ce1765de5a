package node

import (
	"fmt"
	"io"

	"github.com/VictoriaMetrics/metrics"

	"spindle/shard"
)

// export makes the core's state visible on /metrics until stop is called. latest returns the newest
// observation, or nil; it may be a second old.
func export(latest func() *shard.Observation) (stop func()) {
	set := metrics.NewSet()
	set.RegisterMetricsWriter(func(w io.Writer) {
		if o := latest(); o != nil {
			writeObservation(w, o)
		}
	})
	metrics.RegisterSet(set)
	return func() { metrics.UnregisterSet(set, true) }
}

func writeObservation(w io.Writer, o *shard.Observation) {
	gauge := func(name string, v int64) { metrics.WriteGaugeFloat64(w, name, float64(v)) }
	counter := func(name string, v uint64) { metrics.WriteCounterUint64(w, name, v) }
	flag := func(b bool) int64 {
		if b {
			return 1
		}
		return 0
	}
	gauge(`spindle_ready`, flag(o.Ready))
	gauge(`spindle_coordinator_believed`, flag(!o.Connecting))
	counter(`spindle_coordinator_rebuilds_total`, o.Core.Rebuilds)
	gauge(`spindle_revision`, o.Revision)
	gauge(`spindle_frontier_revision`, o.Frontier)
	gauge(`spindle_compact_revision`, o.Compact)
	gauge(`spindle_ring_tail_revision`, o.RingTail)
	gauge(`spindle_ring_bytes`, o.RingSize)

	counter(`spindle_batches_total`, o.Core.Batches)
	counter(`spindle_batched_writes_total`, o.Core.BatchedWrites)
	counter(`spindle_batches_rejected_total`, o.Core.Rejected)
	counter(`spindle_batches_ahead_total`, o.Core.Ahead)
	counter(`spindle_batches_unflattened_total`, o.Core.FlatFailed)
	counter(`spindle_fences_total`, o.Core.Fences)
	counter(`spindle_wrong_creates_total`, o.Core.WrongCreates)
	counter(`spindle_lost_replies_total`, o.Core.LostReplies)
	counter(`spindle_batches_settled_total`, o.Core.Settled)
	counter(`spindle_read_batches_total`, o.Core.ReadBatches)
	counter(`spindle_batched_reads_total`, o.Core.BatchedReads)
	counter(`spindle_reads_repeated_total`, o.Core.Rereads)
	counter(`spindle_gets_from_ring_total`, o.Core.RecentReads)
	counter(`spindle_txns_doomed_total`, o.Core.Doomed)
	counter(`spindle_txns_doomed_wrong_total`, o.Core.DoomedWrong)
	counter(`spindle_large_lists_waited_total`, o.Core.LargeWaited)
	counter(`spindle_large_lists_refused_total`, o.Core.LargeRefused)
	gauge(`spindle_client_memory_bytes`, o.Memory)
	counter(`spindle_unrecorded_events_total`, o.Core.Unrecorded)
	counter(`spindle_foreign_writes_total`, o.Core.Foreign)

	gauge(`spindle_leases_known`, int64(o.Leases))
	counter(`spindle_lease_attaches_total`, o.Core.LeaseAttaches)
	counter(`spindle_lease_copies_revoked_total`, o.Core.LeaseCopiesRevoked)
	counter(`spindle_lease_reconciliations_total`, o.Core.LeaseReconciliations)
	counter(`spindle_lease_reconciliations_complete_total`, o.Core.LeasesReconciled)
	counter(`spindle_lease_orphans_total`, o.Core.LeaseOrphans)

	counter(`spindle_ticks_total`, o.Clock.Ticks)
	counter(`spindle_ticks_fast_total`, o.Clock.FastTicks)
	counter(`spindle_ticks_lost_total`, o.Clock.LostTicks)
	counter(`spindle_ticks_repeated_total`, o.Clock.Reticks)
	counter(`spindle_ticks_folded_total`, o.Clock.Folded)
	counter(`spindle_ranges_granted_total`, o.Clock.Granted)
	counter(`spindle_ranges_orphaned_total`, o.Clock.Orphans)
	counter(`spindle_now_reads_total`, o.Clock.NowReads)
	counter(`spindle_nows_total`, o.Clock.Nows)
	counter(`spindle_coordinator_errors_total`, o.Clock.CallErrors)
	counter(`spindle_coordinator_watches_total`, o.Clock.Watches)
	counter(`spindle_coordinator_watches_stalled_total`, o.Clock.Stalls)
	counter(`spindle_coordinator_reloads_total`, o.Clock.Reloads)
	counter(`spindle_coordinator_snapshots_total`, o.Clock.Snapshots)

	for i := range o.Shards {
		s := &o.Shards[i]
		of := func(name string) string { return fmt.Sprintf("%s{shard=%q}", name, s.Name) }
		gauge(of(`spindle_shard_refused`), flag(s.Refused != ""))
		gauge(of(`spindle_shard_full`), flag(s.Full))
		gauge(of(`spindle_shard_db_bytes`), s.Size)
		gauge(of(`spindle_shard_quota_bytes`), s.Quota)
		gauge(of(`spindle_shard_rebuild_waits`), flag(s.Missing))
		gauge(of(`spindle_shard_clock_revision`), s.Clock)
		gauge(of(`spindle_shard_clock_lag`), max(s.Handed-s.Clock, 0))
		gauge(of(`spindle_shard_frontier_revision`), s.Frontier)
		gauge(of(`spindle_shard_writes_waiting`), int64(s.Queue))
		gauge(of(`spindle_shard_reads_waiting`), int64(s.Reads))
		gauge(of(`spindle_shard_open_ranges`), int64(s.Open))
		gauge(of(`spindle_shard_rejections_in_a_row`), int64(s.Rejections))
		gauge(of(`spindle_shard_events_waiting`), int64(s.Pending))
		gauge(of(`spindle_shard_lease_revokes_waiting`), int64(s.Revokes))
		gauge(of(`spindle_shard_streaming`), flag(s.Streaming))
		gauge(of(`spindle_shard_stream_held`), flag(s.Held))
		if s.Open > 0 {
			name := fmt.Sprintf("{shard=%q,holder=%q}", s.Name, s.Holder)
			gauge(`spindle_shard_oldest_open_revision`+name, s.Oldest)
			metrics.WriteGaugeFloat64(w, `spindle_shard_oldest_open_seconds`+name, float64(s.OldestAge)/1e9)
		}
	}
}
