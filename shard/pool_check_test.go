package shard

import (
	"testing"
	"time"

	"spindle/codec"
)

// A look at the connections of a cluster is no outage that began with the process: Down counts from where they were taken out
// of use. A shard that is down for long is not waited for.
func TestPoolDistrustIsNotDead(t *testing.T) {
	m := newFakeMember(t, echo)
	e := newPoolEnv(t, []string{m.url()})
	e.connected(0)
	e.until("time passes", func() bool { return e.pool.timers.now() > int64(50*time.Millisecond) })
	e.loop.do(func() {
		e.pool.newCheck = func(codec.ClusterID) *Check { return &Check{s: &shardState{c: &Core{state: stateFailed}}} }
		before := e.pool.timers.now()
		e.pool.Distrust(0)
		why, since := e.pool.Down(0)
		if spent := e.pool.timers.now() - before; why == "" || int64(since) > spent {
			t.Errorf("%q for %v, %v after Distrust", why, since, time.Duration(spent))
		}
	})
}
