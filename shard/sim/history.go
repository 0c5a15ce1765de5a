package sim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sort"
)

// This file computes what really happened, from the full logs of the member clusters. It reads the stored
// formats on its own, by docs/formats.md, and shares no code with the core.

const keyClock = "\x00clock"

// parseStamp splits a stored value. (A simulation never moves keys: extensions are not read.)
func parseStamp(v []byte) (mod, create, lease int64, user []byte, err error) {
	if len(v) < 9 {
		return 0, 0, 0, nil, errors.New("no stamp")
	}
	mod = int64(binary.BigEndian.Uint64(v))
	age, n := binary.Uvarint(v[8:])
	if n <= 0 || mod <= 0 || mod >= 1<<56 || int64(age>>1) >= mod {
		return 0, 0, 0, nil, errors.New("bad stamp")
	}
	v = v[8+n:]
	if age&1 != 0 { // the only extension of a run: the client's ID of a lease
		size, k := binary.Uvarint(v)
		if k <= 0 || size < 2 || size > uint64(len(v)-k) || v[k] != 2 {
			return 0, 0, 0, nil, errors.New("bad extension")
		}
		id, m := binary.Uvarint(v[k+1:])
		if m <= 0 || 1+m != int(size) {
			return 0, 0, 0, nil, errors.New("bad extension")
		}
		lease, v = int64(id), v[k+int(size):]
	}
	return mod, mod - int64(age>>1), lease, v, nil
}

type record struct {
	first, last int64
	spare       bool
	kind        byte
	epoch       [16]byte
	proxy       [16]byte
	batch       uint64
	deletes     []recordDelete
}

type recordDelete struct {
	rev      int64
	key, end string
}

func parseRecord(v []byte) (*record, error) {
	if len(v) < 43 || v[8] != 1 {
		return nil, errors.New("not a clock record")
	}
	r := &record{last: int64(binary.BigEndian.Uint64(v)), kind: v[9]}
	copy(r.epoch[:], v[10:26])
	copy(r.proxy[:], v[26:42])
	v = v[42:]
	bad := false
	num := func() uint64 {
		x, n := binary.Uvarint(v)
		if n <= 0 {
			bad = true
			return 0
		}
		v = v[n:]
		return x
	}
	str := func() string {
		n := num()
		if bad || n > uint64(len(v)) {
			bad = true
			return ""
		}
		s := string(v[:n])
		v = v[n:]
		return s
	}
	r.batch = num()
	width := num()
	r.first, r.spare = r.last-int64(width>>1), width&1 == 1
	for n := num(); n > 0 && !bad; n-- {
		d := recordDelete{rev: r.first + int64(num())}
		d.key = str()
		d.end = str()
		r.deletes = append(r.deletes, d)
	}
	if bad {
		return nil, errors.New("bad clock record")
	}
	return r, nil
}

// fact is one change of one key as clients must see it.
type fact struct {
	rev     int64
	shard   int
	key     string
	delete  bool
	value   string
	create  int64
	version int64
	local   int64
	// unrecorded: nobody's request; a lease that expired.
	unrecorded bool
	lease      int64 // as clients know it
	member     int64 // as the member knows it
	at         int64 // virtual ns
	// window is the time during which the key's value was foreign, until this change; nil if it was not.
	window *window
}

// history is what really happened.
type history struct {
	shards int
	byRev  map[int64][]*fact  // all facts of a revision, in order
	byKey  map[string][]*fact // all facts of a key, oldest first
	revs   []int64            // revisions with facts, ascending
	values map[string]*fact   // by the value that was put: values are unique in a run
	ranges []rangeOf          // ranges of all records, ascending
	last   int64              // the largest revision of any record
	wait   int                // changes that still wait for a record
	// windows are the times at which a key's value on its shard was foreign, raw those that have not ended.
	windows []*window
	raw     map[string]*window
	ended   map[*Change]*window // by the delete that ended it, which waits for a record
	visible map[string]bool     // clients see the key, what waits for a record included
}

// window is a time during which a key had a value that somebody else had put: clients saw what was there before.
type window struct {
	key    string
	shard  int
	puts   int64 // how many
	from   int64 // local revision of the first
	to     int64 // local revision of the change that ended it, 0 if there was none
	after  int64 // the clock when it began
	until  int64 // the revision of the change that ended it
	hidden bool  // clients saw nothing
}

type rangeOf struct {
	local, at   int64 // local revision of the record, and when it was written
	first, last int64
	shard       int
	spare       bool // the first is for what happened without a record
	proxy       [16]byte
	batch       uint64
}

func logsOf(members []*Cluster) (logs [][]*Change) {
	for _, m := range members {
		logs = append(logs, m.Log())
	}
	return logs
}

// readHistory works through the clusters' logs. Whatever in them breaks a promise is an error.
func readHistory(logs [][]*Change) (*history, error) {
	h := &history{shards: len(logs), byRev: map[int64][]*fact{}, byKey: map[string][]*fact{}, values: map[string]*fact{}, raw: map[string]*window{}, ended: map[*Change]*window{}, visible: map[string]bool{}}
	for i, log := range logs {
		if err := h.readShard(i, log); err != nil {
			return nil, fmt.Errorf("shard%d: %w", i, err)
		}
	}
	sort.Slice(h.ranges, func(i, j int) bool { return h.ranges[i].first < h.ranges[j].first })
	for i := 1; i < len(h.ranges); i++ {
		if a, b := h.ranges[i-1], h.ranges[i]; b.first <= a.last {
			return nil, fmt.Errorf("two records share revisions: %d..%d on shard%d (proxy %x batch %d) and %d..%d on shard%d (proxy %x batch %d)",
				a.first, a.last, a.shard, a.proxy[:2], a.batch, b.first, b.last, b.shard, b.proxy[:2], b.batch)
		}
	}
	for rev := range h.byRev {
		h.revs = append(h.revs, rev)
	}
	sort.Slice(h.revs, func(i, j int) bool { return h.revs[i] < h.revs[j] })
	return h, nil
}

func (h *history) readShard(shard int, log []*Change) error {
	var waiting []*Change
	var closing []*window // until the next record
	clock := int64(0)
	for len(log) > 0 {
		n := 1
		for n < len(log) && log[n].Main == log[0].Main {
			n++
		}
		group := log[:n]
		log = log[n:]
		var rec *record
		var changes []*Change
		for _, c := range group {
			k := string(c.KV.Key)
			if k == keyClock {
				if c.Delete || rec != nil {
					return fmt.Errorf("L%d: the clock was deleted, or written twice in one revision", c.Main)
				}
				var err error
				if rec, err = parseRecord(c.KV.Value); err != nil {
					return fmt.Errorf("L%d: %w", c.Main, err)
				}
			} else if k[0] != 0 {
				changes = append(changes, c)
			}
		}
		if rec == nil {
			for _, c := range changes {
				k := string(c.KV.Key)
				w := h.raw[k]
				switch {
				case !c.Delete && w == nil:
					w = &window{key: k, shard: shard, puts: 1, from: c.Main, after: clock, until: 1 << 62, hidden: !h.visible[k]}
					h.raw[k], h.windows = w, append(h.windows, w)
				case !c.Delete:
					w.puts++
				case w != nil && w.hidden:
					h.close(w, c.Main, 1<<62) // clients never saw the key
					closing = append(closing, w)
				default:
					if w != nil {
						delete(h.raw, k)
						h.ended[c] = w
					}
					h.visible[k] = false
					waiting = append(waiting, c)
				}
			}
			continue
		}
		if rec.last == 0 && clock == 0 && len(changes) == 0 {
			continue // the first start
		}
		if rec.first <= clock || rec.last < rec.first {
			return fmt.Errorf("L%d: a record of %d..%d follows the clock %d", group[0].Main, rec.first, rec.last, clock)
		}
		clock = rec.last
		for _, w := range closing {
			w.until = rec.first
		}
		closing = nil
		h.last = max(h.last, rec.last)
		h.ranges = append(h.ranges, rangeOf{group[0].Main, group[0].At, rec.first, rec.last, shard, rec.spare, rec.proxy, rec.batch})
		for _, c := range waiting {
			if err := h.add(shard, c, rec.first, true); err != nil {
				return err
			}
		}
		waiting = nil
		if err := h.readBatch(shard, rec, changes); err != nil {
			return fmt.Errorf("L%d: %w", group[0].Main, err)
		}
	}
	h.wait += len(waiting)
	return nil
}

func (h *history) readBatch(shard int, rec *record, changes []*Change) error {
	at := rec.first
	for _, c := range changes {
		var rev int64
		if c.Delete {
			for _, d := range rec.deletes {
				if within(string(c.KV.Key), d.key, d.end) {
					rev = d.rev
					break
				}
			}
			if rev == 0 {
				return fmt.Errorf("the delete of %q is in no record", c.KV.Key)
			}
		} else {
			mod, _, _, _, err := parseStamp(c.KV.Value)
			if err != nil {
				return fmt.Errorf("key %q: %w", c.KV.Key, err)
			}
			rev = mod
		}
		if rev < at || rev > rec.last {
			return fmt.Errorf("key %q has revision %d in a record of %d..%d, behind %d", c.KV.Key, rev, rec.first, rec.last, at)
		}
		if rec.spare && rev == rec.first {
			return fmt.Errorf("key %q has the spare revision %d", c.KV.Key, rev)
		}
		at = rev
		if w := h.raw[string(c.KV.Key)]; c.Delete && w != nil && w.hidden {
			h.close(w, c.Main, rev)
			continue
		}
		h.visible[string(c.KV.Key)] = !c.Delete
		if err := h.add(shard, c, rev, false); err != nil {
			return err
		}
	}
	return nil
}

// close ends a window.
func (h *history) close(w *window, local, rev int64) {
	w.to, w.until = local, rev
	delete(h.raw, w.key)
}

// add puts one change into the history, and checks create revision and version.
func (h *history) add(shard int, c *Change, rev int64, unrecorded bool) error {
	f := &fact{rev: rev, shard: shard, key: string(c.KV.Key), delete: c.Delete, local: c.Main, unrecorded: unrecorded, at: c.At}
	puts := int64(0)
	w := h.ended[c]
	if w == nil && !unrecorded {
		w = h.raw[f.key]
	}
	if w != nil {
		f.window, puts = w, w.puts
		w.to, w.until = c.Main, rev
		if h.raw[f.key] == w {
			delete(h.raw, f.key)
		}
	}
	old := h.at(f.key, rev) // nothing newer is there yet: the shard's log is read in order
	if old != nil && old.shard != shard {
		return fmt.Errorf("key %q lies on shard%d too", f.key, old.shard)
	}
	if !c.Delete {
		_, create, lease, user, err := parseStamp(c.KV.Value)
		if err != nil || unrecorded {
			return fmt.Errorf("L%d: key %q was put by somebody else (%v)", c.Main, f.key, err)
		}
		f.value, f.create, f.version, f.lease, f.member = string(user), create, c.KV.Version, lease, c.KV.Lease
		if lease == 0 {
			f.lease = c.KV.Lease
		}
		wantCreate, wantVersion := rev, 1+puts // a foreign put counts as a version
		if old != nil {
			wantCreate, wantVersion = old.create, old.version+1+puts
		}
		if create != wantCreate || f.version != wantVersion {
			return fmt.Errorf("key %q at revision %d has create revision %d and version %d, must be %d and %d", f.key, rev, create, f.version, wantCreate, wantVersion)
		}
		if other := h.values[f.value]; other != nil {
			return fmt.Errorf("the write of %q was applied twice: at revisions %d and %d", f.value, other.rev, rev)
		}
		h.values[f.value] = f
	} else if old == nil {
		return fmt.Errorf("L%d: key %q was deleted at revision %d and did not exist", c.Main, f.key, rev)
	}
	h.byRev[rev] = append(h.byRev[rev], f)
	h.byKey[f.key] = append(h.byKey[f.key], f)
	return nil
}

// at returns what key holds at rev, nil if it does not exist.
func (h *history) at(key string, rev int64) *fact {
	fs := h.byKey[key]
	i := sort.Search(len(fs), func(i int) bool { return fs[i].rev > rev })
	if i == 0 || fs[i-1].delete {
		return nil
	}
	return fs[i-1]
}

// state returns the pairs of [key, end) at rev, in order of key.
func (h *history) state(key, end string, rev int64) []*fact {
	var out []*fact
	for k := range h.byKey {
		if within(k, key, end) {
			if f := h.at(k, rev); f != nil {
				out = append(out, f)
			}
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].key < out[j].key })
	return out
}

func (f *fact) String() string {
	if f == nil {
		return "nothing"
	}
	if f.delete {
		return fmt.Sprintf("R%d shard%d L%d: delete %s", f.rev, f.shard, f.local, f.key)
	}
	return fmt.Sprintf("R%d shard%d L%d: put %s=%s create=%d version=%d", f.rev, f.shard, f.local, f.key, f.value, f.create, f.version)
}
