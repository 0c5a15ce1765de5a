package tlsconn

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Files that could not be read once are tried again although they do not change any more, and the log says so once.
func TestFailedReloadIsRepeated(t *testing.T) {
	name := filepath.Join(t.TempDir(), "cert")
	write := func(text string) {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	var log bytes.Buffer
	var fail error
	var got string
	now := time.Unix(1, 0)
	f := &files{names: []string{name}, log: slog.New(slog.NewTextHandler(&log, nil)), now: func() time.Time { return now }}
	f.load = func() error {
		if fail != nil {
			return fail
		}
		b, err := os.ReadFile(name)
		got = string(b)
		return err
	}
	if err := f.start(); err != nil || got != "first" {
		t.Fatal(got, err)
	}
	refresh := func() {
		now = now.Add(lookEvery)
		f.refresh()
	}
	lines := func() int { return strings.Count(log.String(), "level=ERROR") }
	fail = errors.New("too many open files")
	write("the second")
	for range 3 {
		refresh()
	}
	if got != "first" || lines() != 1 {
		t.Errorf("%q, %d errors in the log", got, lines())
	}
	write("the third one")
	refresh()
	refresh()
	if lines() != 2 {
		t.Errorf("%d errors in the log", lines())
	}
	fail = nil
	if refresh(); got != "the third one" {
		t.Errorf("%q is in use", got)
	}
	got = ""
	if refresh(); got != "" {
		t.Error("read again without a change")
	}
}
