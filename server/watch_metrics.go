package server

import (
	"github.com/VictoriaMetrics/metrics"

	"spindle/watchring"
)

// watchStats counts for the Hubs of all loops; like the registry it belongs to the process.
var watchStats watchring.Stats

var (
	_ = gaugeOf(`spindle_watch_watchers`, &watchStats.Watchers)
	_ = gaugeOf(`spindle_watch_watchers_lagging`, &watchStats.Lagging)      // behind, each reads the ring on its own
	_ = gaugeOf(`spindle_watch_watchers_reading_history`, &watchStats.Deep) // further behind: the shards' history

	_ = counterOf(`spindle_watch_events_sent_total`, func() uint64 { return watchStats.Events.Load() })
	_ = counterOf(`spindle_watch_responses_sent_total`, func() uint64 { return watchStats.Responses.Load() })
	_ = counterOf(`spindle_watch_canceled_compacted_total`, func() uint64 { return watchStats.Compacted.Load() })
	_ = counterOf(`spindle_watch_history_reads_total`, func() uint64 { return watchStats.Histories.Load() })
	_ = counterOf(`spindle_watch_progress_sent_total`, func() uint64 { return watchStats.Progress.Load() })

	metricWatchesRefused = metrics.NewCounter(`spindle_watch_refused_total`) // over a client's limits
)

// counterOf shows a number that is counted elsewhere.
func counterOf(name string, f func() uint64) *metrics.Gauge {
	return metrics.NewGauge(name, func() float64 { return float64(f()) })
}
