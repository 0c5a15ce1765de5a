package watchring

// futureHeap holds watchers that start above their group's cursor, the earliest first. Watcher.slot is
// the place in it.
type futureHeap []*Watcher

func (f *futureHeap) push(w *Watcher) {
	w.slot = len(*f)
	*f = append(*f, w)
	f.up(w.slot)
}

// remove takes out the watcher at place i.
func (f *futureHeap) remove(i int) {
	q := *f
	last := len(q) - 1
	q[i] = q[last]
	q[i].slot = i
	q[last] = nil
	*f = q[:last]
	if i < last {
		f.up(i)
		f.down(i)
	}
}

func (f futureHeap) up(i int) {
	for i > 0 {
		p := (i - 1) / 2
		if f[p].Start <= f[i].Start {
			return
		}
		f.swap(p, i)
		i = p
	}
}

func (f futureHeap) down(i int) {
	for {
		c := 2*i + 1
		if c >= len(f) {
			return
		}
		if c+1 < len(f) && f[c+1].Start < f[c].Start {
			c++
		}
		if f[i].Start <= f[c].Start {
			return
		}
		f.swap(i, c)
		i = c
	}
}

func (f futureHeap) swap(i, j int) {
	f[i], f[j] = f[j], f[i]
	f[i].slot, f[j].slot = i, j
}
