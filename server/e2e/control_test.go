package e2e

import (
	"context"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// controlPause is the pause between two reads of a control.
const controlPause = 5 * time.Millisecond

// control is what the machine makes everybody wait for: reads of a member that nothing happens to, past the proxy under test.
type control struct {
	mu   sync.Mutex
	most time.Duration // since mark
	at   time.Time     // when the round began that is under way
}

// startControl begins; it ends with the test.
func startControl(t *testing.T, url string) *control {
	t.Helper()
	conn := dial(t, url)
	ctx, cancel := context.WithCancel(context.Background())
	c := &control{at: time.Now()}
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	wg.Go(func() {
		pause := time.NewTimer(controlPause)
		defer pause.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-pause.C:
			}
			if _, err := conn.kv.Range(ctx, &pb.RangeRequest{Key: []byte("control")}); err != nil && ctx.Err() == nil {
				t.Errorf("the control: %v", err)
				return
			}
			c.mu.Lock()
			c.most, c.at = max(c.most, time.Since(c.at)), time.Now()
			c.mu.Unlock()
			pause.Reset(controlPause)
		}
	})
	return c
}

// mark begins a new measurement.
func (c *control) mark() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.most = 0
}

// longest returns how long a read and the pause before it took at most since mark, that under way among them.
func (c *control) longest() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return max(c.most, time.Since(c.at))
}
