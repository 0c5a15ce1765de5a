package compare

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime/pprof"
	"sync"
	"time"
)

// profile takes a CPU profile and the allocations of each of t's processes that shows them, and a CPU profile of this one, which is the
// generator, from after on and for as long as the load measures, to files that begin with name. What it returns waits for the end of that.
func (e *Env) profile(ctx context.Context, name string, t *target, after, long time.Duration) (wait func()) {
	seconds := max(1, int(long/time.Second))
	var all sync.WaitGroup
	all.Go(func() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(after):
		}
		file := filepath.Join(e.cfg.Profile, name+"-generator.cpu")
		if err := profileSelf(ctx, long, file); err != nil {
			e.say("no profile of the generator: %v", err)
		}
	})
	for _, p := range t.procs {
		if p.web == "" {
			continue
		}
		for kind, path := range map[string]string{"cpu": "profile", "allocs": "allocs"} {
			all.Go(func() {
				select {
				case <-ctx.Done():
					return
				case <-time.After(after):
				}
				file := filepath.Join(e.cfg.Profile, fmt.Sprintf("%s-%s.%s", name, p.name, kind))
				if err := fetch(ctx, fmt.Sprintf("%s/debug/pprof/%s?seconds=%d", p.web, path, seconds), file); err != nil {
					e.say("no profile of %s: %v", p.name, err)
				}
			})
		}
	}
	return all.Wait
}

// profileSelf profiles this process for as long as the load measures.
func profileSelf(ctx context.Context, long time.Duration, file string) error {
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := pprof.StartCPUProfile(out); err != nil {
		return err
	}
	defer pprof.StopCPUProfile()
	select {
	case <-ctx.Done():
	case <-time.After(long):
	}
	return nil
}

// fetch writes what url shows to a file.
func fetch(ctx context.Context, url, file string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, logTail))
		return fmt.Errorf("%s: %s", resp.Status, text)
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, resp.Body); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
