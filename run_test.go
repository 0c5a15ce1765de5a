package main

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"spindle/server/node"
)

// TestStartAgainIsTriedAgain: a proxy that starts again within its process does not end because its ports are in use for a moment; it does
// when they stay so, and waits for nothing when it is to stop.
func TestStartAgainIsTriedAgain(t *testing.T) {
	inUse := errors.New("address already in use")
	for _, c := range []struct {
		name           string
		failures, stop int // starts that fail, and the one during which it is told to stop, 0 for none
		starts         int
		failed         bool
		pauses         int
	}{
		{"at once", 0, 0, 1, false, 0},
		{"after a moment", 2, 0, 3, false, 2},
		{"never", 9, 0, startTries, true, startTries - 1},
		{"stopped", 9, 2, 2, true, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				begun, starts := time.Now(), 0
				n, err := tryStart(ctx, func() (*node.Node, error) {
					if starts++; starts == c.stop {
						cancel()
					}
					if starts <= c.failures {
						return nil, inUse
					}
					return &node.Node{}, nil
				})
				if starts != c.starts || (err != nil) != c.failed || (n == nil) != c.failed {
					t.Errorf("%d starts, %v, %v", starts, n != nil, err)
				}
				if d := time.Since(begun); d != time.Duration(c.pauses)*startPause {
					t.Errorf("it took %v", d)
				}
			})
		})
	}
}
