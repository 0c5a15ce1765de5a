package tlsconn

import (
	"log/slog"
	"os"
	"sync"
	"time"
)

// lookEvery is how often files are looked at, at most: a flood of handshakes does not become one of stat calls.
const lookEvery = time.Second

// files are read at the start, and again when one of them has changed: another time, size or inode (a
// certificate manager renames, Kubernetes swaps a symbolic link). What was read is in the loader's hands.
// refresh may be called on any goroutine, but not on an event loop: it reads files.
type files struct {
	names []string
	load  func() error // reads all of them; what is in use stays when it fails
	log   *slog.Logger
	now   func() time.Time

	mu     sync.Mutex
	looked time.Time
	seen   []os.FileInfo // when last read; nil for one that was not there
	failed []os.FileInfo // when they last could not be used; the log has it
}

// start reads the files for the first time.
func (f *files) start() error {
	f.looked, f.seen = f.now(), f.stat()
	return f.load()
}

// refresh reads the files again if they changed. While one goroutine does, the others use what there is.
func (f *files) refresh() {
	if len(f.names) == 0 || !f.mu.TryLock() {
		return
	}
	defer f.mu.Unlock()
	now := f.now()
	if now.Sub(f.looked) < lookEvery {
		return
	}
	f.looked = now
	// Looked at before they are read: a change meanwhile is seen the next time.
	seen := f.stat()
	if same(seen, f.seen) {
		return
	}
	if err := f.load(); err != nil {
		// Perhaps half of them were written, or no descriptor was left: until they can be used they are tried again.
		if f.failed != nil && same(seen, f.failed) {
			return
		}
		f.failed = seen
		f.log.Error("changed TLS files cannot be used, going on with the old ones; put good files there", "files", f.names, "error", err)
		return
	}
	f.seen, f.failed = seen, nil
	f.log.Info("TLS files have changed and were read again", "files", f.names)
}

func (f *files) stat() []os.FileInfo {
	out := make([]os.FileInfo, len(f.names))
	for i, name := range f.names {
		if info, err := os.Stat(name); err == nil {
			out[i] = info
		}
	}
	return out
}

func same(a, b []os.FileInfo) bool {
	for i := range a {
		if (a[i] == nil) != (b[i] == nil) {
			return false
		}
		if a[i] != nil && !(os.SameFile(a[i], b[i]) && a[i].Size() == b[i].Size() && a[i].ModTime().Equal(b[i].ModTime())) {
			return false
		}
	}
	return true
}
