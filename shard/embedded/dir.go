package embedded

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

const (
	stateFile       = "members.json"
	lockFile        = "lock"
	coordinatorDir  = "coordinator"
	shardPrefix     = "shard-"
	stateFormat     = 1
	dirMode         = 0o700
	fileMode        = 0o600
	lostAndFoundDir = "lost+found" // a mount point of its own has one; it is nobody's data
)

// state is the content of members.json.
type state struct {
	Format int `json:"format"`
	Shards int `json:"shards"`
	// Complete is set once every member has served for the first time. Before, a missing member is one
	// that was not made yet; afterwards it is lost data.
	Complete bool `json:"complete"`
}

// ShardName returns the name of member cluster i, counted from 0.
func ShardName(i int) string { return shardDir(i) }

func shardDir(i int) string { return shardPrefix + strconv.Itoa(i+1) }

// dir is an opened and locked directory.
type dir struct {
	path  string
	lock  *os.File
	state state
}

// openDir locks path and checks that it is new, or was made by this package for the same number of shards.
func openDir(path string, shards int) (*dir, error) {
	if err := os.MkdirAll(path, dirMode); err != nil {
		return nil, fmt.Errorf("cannot make the data directory: %w; choose another with --data-dir", err)
	}
	// The check for foreign data comes before the lock, so that nothing is written into a stranger's
	// directory, and again after it, because another process may just be making it.
	if _, err := readState(path); err != nil {
		return nil, err
	}
	lock, err := lockPath(path)
	if err != nil {
		return nil, err
	}
	d := &dir{path: path, lock: lock}
	if err := d.load(shards); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

func (d *dir) load(shards int) error {
	st, err := readState(d.path)
	if err != nil {
		return err
	}
	if st.Format == 0 {
		d.state = state{Format: stateFormat, Shards: shards}
		return d.save()
	}
	if st.Format != stateFormat {
		return fmt.Errorf("%s has format %d and this version of Spindle knows %d only: use the version that wrote it, or another --data-dir",
			filepath.Join(d.path, stateFile), st.Format, stateFormat)
	}
	if st.Shards != shards {
		return fmt.Errorf("%s holds %d shards, --embedded-shards says %d: start with --embedded-shards %d, or choose another --data-dir (shards cannot be added yet)",
			d.path, st.Shards, shards, st.Shards)
	}
	if st.Complete {
		for i := range st.Shards {
			name := filepath.Join(d.path, shardDir(i))
			if _, err := os.Stat(filepath.Join(name, "member")); errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%s has lost its data: put it back from where it went, or start anew with another --data-dir", name)
			} else if err != nil {
				return fmt.Errorf("cannot look into %s: %w", name, err)
			}
		}
	}
	d.state = st
	return nil
}

// readState returns the state in path (Format 0 when the directory is empty), or an error when what is
// there was not made by this package.
func readState(path string) (state, error) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return state{}, fmt.Errorf("cannot read the data directory: %w; choose another with --data-dir", err)
	}
	known, stranger := false, ""
	for _, e := range entries {
		switch name := e.Name(); name {
		case stateFile:
			known = true
		case lockFile, stateFile + ".tmp", lostAndFoundDir:
		case "member":
			return state{}, fmt.Errorf("%s is the data directory of an etcd, not of Spindle: choose another with --data-dir (to use that etcd as a shard, start it and name it with --shard)", path)
		default:
			stranger = name
		}
	}
	if !known {
		if stranger != "" {
			return state{}, fmt.Errorf("%s is not empty and was not made by Spindle (it holds %q): choose another directory with --data-dir", path, stranger)
		}
		return state{}, nil
	}
	var st state
	b, err := os.ReadFile(filepath.Join(path, stateFile))
	if err != nil {
		return st, fmt.Errorf("cannot read %s: %w", filepath.Join(path, stateFile), err)
	}
	if err := json.Unmarshal(b, &st); err != nil || st.Format <= 0 || st.Shards <= 0 {
		return st, fmt.Errorf("%s is damaged: it should say {\"format\":%d,\"shards\":N,\"complete\":true}, N being the number of %s* directories",
			filepath.Join(path, stateFile), stateFormat, shardPrefix)
	}
	return st, nil
}

// save writes members.json so that a crash leaves the old or the new one.
func (d *dir) save() error {
	b, err := json.Marshal(d.state)
	if err != nil {
		return err
	}
	name := filepath.Join(d.path, stateFile)
	tmp := name + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, fileMode)
	if err != nil {
		return fmt.Errorf("cannot write to the data directory: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, name)
	}
	if err == nil {
		err = syncDir(d.path)
	}
	if err != nil {
		return fmt.Errorf("cannot write to the data directory: %w", err)
	}
	return nil
}

func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func (d *dir) close() {
	// Closing the file gives up the lock; the file stays, removing it would race with the next owner.
	d.lock.Close()
}

// lockPath takes the directory for this process. The lock dies with the process, so a kill -9 leaves
// nothing to clean up.
func lockPath(path string) (*os.File, error) {
	name := filepath.Join(path, lockFile)
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, fileMode)
	if err != nil {
		return nil, fmt.Errorf("cannot write to the data directory: %w; choose another with --data-dir", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, fmt.Errorf("%s is in use by another Spindle: stop that one first, or choose another directory with --data-dir", path)
	}
	return nil, fmt.Errorf("cannot lock %s: %w", name, err)
}
