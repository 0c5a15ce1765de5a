package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/panjf2000/gnet/v2"
)

// anchor is the context of a connection that shows its loop, and is the loop's doorbell from then on.
type anchor struct{ loop atomic.Pointer[Loop] }

// handler receives gnet's events for an Engine.
type handler Engine

// OnBoot implements gnet.EventHandler. The loops do not exist yet.
func (h *handler) OnBoot(gnet.Engine) gnet.Action { return gnet.None }

// OnShutdown implements gnet.EventHandler. gnet calls it before it ends its loops.
func (h *handler) OnShutdown(gnet.Engine) {
	if h.started.Load() {
		for _, l := range h.loops {
			l.stop()
		}
	}
}

// OnTick implements gnet.EventHandler. gnet calls it on a goroutine of its own.
func (h *handler) OnTick() (time.Duration, gnet.Action) {
	if h.started.Load() {
		h.ticks++
		second := h.ticks%int64(time.Second/tickEvery) == 0
		h.pace.look(second)
		second = second && h.conns.Load() > 0
		for _, l := range h.loops {
			l.ring(second)
		}
	}
	return tickEvery, gnet.None
}

// OnOpen implements gnet.EventHandler. Every connection was enrolled: an anchor, or one with an attachment.
func (h *handler) OnOpen(c gnet.Conn) ([]byte, gnet.Action) {
	if a, ok := c.Context().(*attachment); ok && !a.event(c, attachmentOpen) {
		return nil, gnet.Close
	}
	return nil, gnet.None
}

// OnTraffic implements gnet.EventHandler.
func (h *handler) OnTraffic(c gnet.Conn) gnet.Action {
	if bell, ok := c.Context().(*anchor); ok {
		_, _ = c.Discard(-1)
		if l := bell.loop.Load(); l != nil {
			_ = (*doorbell)(l).Run(context.Background())
			l.idle()
		}
		return gnet.None
	}
	a, ok := c.Context().(*attachment)
	if !ok {
		return gnet.None
	}
	if !a.event(c, attachmentTraffic) {
		return gnet.Close // gnet ignores it for a connection that is closed, and leaves its buffers alone
	}
	a.loop.idle()
	return gnet.None
}

// OnClose implements gnet.EventHandler.
func (h *handler) OnClose(c gnet.Conn, err error) gnet.Action {
	switch a := c.Context().(type) {
	case *attachment:
		a.close(c, err)
	case *anchor:
		// Nobody closes it but a loop that ends.
		if e := (*Engine)(h); a.loop.Load() != nil && !e.draining.Load() {
			e.end(errLoopEnded)
		}
	}
	return gnet.None
}

var errLoopEnded = errors.New("spindle: an event loop has ended by itself, see the log")

// gnetLog passes gnet's log on. Its news of every start are for debugging here.
type gnetLog struct{ log *slog.Logger }

func (g gnetLog) Debugf(format string, args ...any) { g.write(slog.LevelDebug, format, args) }
func (g gnetLog) Infof(format string, args ...any)  { g.write(slog.LevelDebug, format, args) }
func (g gnetLog) Warnf(format string, args ...any)  { g.write(slog.LevelWarn, format, args) }
func (g gnetLog) Errorf(format string, args ...any) { g.write(slog.LevelError, format, args) }
func (g gnetLog) Fatalf(format string, args ...any) { g.write(slog.LevelError, format, args) }

func (g gnetLog) write(level slog.Level, format string, args []any) {
	if g.log.Enabled(context.Background(), level) {
		g.log.Log(context.Background(), level, "gnet: "+fmt.Sprintf(format, args...))
	}
}
