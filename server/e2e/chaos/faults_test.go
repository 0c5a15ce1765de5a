package chaos

import (
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fault is something that breaks, and how it is mended.
type fault struct {
	kind   string
	target string
	// affects says whether writes to a shard through a proxy may suffer.
	affects func(p, s int) bool
	begin   func() error
	undo    func() error
	await   func() error // after the undo of all: until the processes serve
	// parts names what it touches: two faults at a time touch different things.
	parts []string
}

func (f *fault) String() string { return f.kind + ", " + f.target }

// kind makes faults of a kind; the random numbers decide the target.
type kind struct {
	name string
	make func(s *system, r *rand.Rand) *fault
}

const slowDisk = "slow disk"

// kinds are all of them.
var kinds = []kind{
	{"proxy killed", func(s *system, r *rand.Rand) *fault { return s.proxyKilled(r.IntN(proxies)) }},
	{"leader killed", func(s *system, r *rand.Rand) *fault { return s.nodeKilled(true, r.IntN(3)) }},
	{"follower killed", func(s *system, r *rand.Rand) *fault { return s.nodeKilled(false, r.IntN(3)) }},
	{"shard killed", func(s *system, r *rand.Rand) *fault {
		place := r.IntN(shards)
		return membersKilled(shardNames[place], s.nodes(place), onShard(place), false)
	}},
	{"coordinator killed", func(s *system, _ *rand.Rand) *fault {
		return membersKilled("coordinator", []*member{s.coordinator}, anywhere, false)
	}},
	{"coordinator wiped", func(s *system, _ *rand.Rand) *fault {
		return membersKilled("coordinator", []*member{s.coordinator}, anywhere, true)
	}},
	{"proxy stopped", func(s *system, r *rand.Rand) *fault {
		i := r.IntN(proxies)
		p := s.proxies[i]
		return stopped(p.name, []string{p.name}, throughProxy(i), func(sig syscall.Signal) error { return p.proc.signal(sig) })
	}},
	{"no descriptors", func(s *system, r *rand.Rand) *fault { return s.noDescriptors(r.IntN(proxies), r.IntN(shards)) }},
	{"node stopped", func(s *system, r *rand.Rand) *fault {
		m := s.members[r.IntN(len(s.members))]
		return stopped(m.spec.Name, []string{m.spec.Name, shardNames[m.shard]}, onShard(m.shard), m.signal)
	}},
	{slowDisk, func(s *system, r *rand.Rand) *fault { return s.slowDisk(r.IntN(shards)) }},
	{"coordinator stopped", func(s *system, _ *rand.Rand) *fault {
		return stopped("coordinator", []string{"coordinator"}, anywhere, s.coordinator.signal)
	}},
	{"delay", func(s *system, r *rand.Rand) *fault {
		state := linkState{delay: time.Millisecond * time.Duration(1+r.IntN(100))}
		return s.someLinks(r).state(state, fmt.Sprintf(" by %v", state.delay))
	}},
	{"cut", func(s *system, r *rand.Rand) *fault { return s.someLinks(r).cut() }},
	{"half-open", func(s *system, r *rand.Rand) *fault {
		which := []struct {
			name    string
			swallow [2]bool
		}{
			{"requests are lost", [2]bool{asking: true}}, {"answers are lost", [2]bool{answering: true}}, {"both are lost", [2]bool{true, true}},
		}[r.IntN(3)]
		return s.someLinks(r).state(linkState{swallow: which.swallow}, ", "+which.name)
	}},
	{"partition proxy-shard", func(s *system, r *rand.Rand) *fault { return s.shardLinks(r).state(linkState{hold: true}, "") }},
	{"partition proxy-coordinator", func(s *system, r *rand.Rand) *fault { return s.coordinatorLinks(r).state(linkState{hold: true}, "") }},
	{"partition node-node", func(s *system, r *rand.Rand) *fault { return s.peerLinksOf(r).state(linkState{hold: true}, "") }},
}

func anywhere(int, int) bool { return true }

func onShard(place int) func(p, s int) bool { return func(_, s int) bool { return s == place } }

func throughProxy(i int) func(p, s int) bool { return func(p, _ int) bool { return p == i } }

func (s *system) proxyKilled(i int) *fault {
	p := s.proxies[i]
	return &fault{
		target: p.name, affects: throughProxy(i), parts: []string{p.name},
		begin: func() error { p.proc.kill(); return nil },
		undo:  p.run,
		await: p.await,
	}
}

// noDescriptors takes from a proxy every descriptor that it has not got yet, and cuts its connections to its clients and to
// one shard, which cannot be made anew then.
func (s *system) noDescriptors(i, place int) *fault {
	p := s.proxies[i]
	var before unix.Rlimit
	return &fault{
		target: p.name, affects: throughProxy(i), parts: []string{p.name},
		begin: func() error {
			pid := p.proc.cmd.Process.Pid
			if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &before); err != nil {
				return err
			}
			if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: before.Max}, nil); err != nil {
				return err
			}
			p.link.cut()
			for _, m := range s.nodes(place) {
				m.link[i].cut()
			}
			return nil
		},
		undo:  func() error { return unix.Prlimit(p.proc.cmd.Process.Pid, unix.RLIMIT_NOFILE, &before, nil) },
		await: nothing,
	}
}

// nodeKilled kills the leader of the shard with three nodes, or another one.
func (s *system) nodeKilled(leader bool, n int) *fault {
	var m *member
	return &fault{
		target: shardNames[tripled], affects: onShard(tripled), parts: []string{shardNames[tripled]},
		begin: func() error {
			nodes := s.nodes(tripled)
			lead := s.leader(tripled)
			if m = nodes[n]; leader && lead != nil {
				m = lead
			} else if !leader && m == lead {
				m = nodes[(n+1)%len(nodes)]
			}
			m.kill()
			return nil
		},
		undo:  func() error { return m.run(s.dir) },
		await: func() error { return m.await() },
	}
}

func membersKilled(name string, members []*member, affects func(p, s int) bool, wipe bool) *fault {
	return &fault{
		target: name, affects: affects, parts: []string{name},
		begin: func() error {
			for _, m := range members {
				m.kill()
			}
			return nil
		},
		undo: func() error {
			for _, m := range members {
				if wipe {
					if err := m.wipe(); err != nil {
						return err
					}
				}
				if err := m.run(m.proc.cmd.Dir); err != nil {
					return err
				}
			}
			return nil
		},
		await: func() error {
			for _, m := range members {
				if err := m.await(); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// slowDisk makes every fsync of a shard's nodes take slowFsync.
func (s *system) slowDisk(place int) *fault {
	signal := func(sig syscall.Signal) func() error {
		return func() error {
			for _, m := range s.nodes(place) {
				if err := m.signal(sig); err != nil {
					return err
				}
			}
			return nil
		}
	}
	return &fault{
		target: shardNames[place], affects: onShard(place), parts: []string{shardNames[place]},
		begin: signal(slowDown), undo: signal(speedUp), await: nothing,
	}
}

func nothing() error { return nil }

func stopped(name string, parts []string, affects func(p, s int) bool, signal func(syscall.Signal) error) *fault {
	return &fault{
		target: name, affects: affects, parts: parts,
		begin: func() error { return signal(syscall.SIGSTOP) },
		undo:  func() error { return signal(syscall.SIGCONT) },
		await: nothing,
	}
}

// linkSet is links that break together.
type linkSet struct {
	name    string
	affects func(p, s int) bool
	parts   []string
	links   func() []*link // when the fault begins
	// reset says that a half-open connection ends with the fault. etcd's nodes among themselves may never notice one on
	// which nothing comes in one direction, and have no leader for as long as it stays.
	reset bool
}

// someLinks chooses among all kinds of links.
func (s *system) someLinks(r *rand.Rand) linkSet {
	switch r.IntN(4) {
	case 0:
		return s.coordinatorLinks(r)
	case 1:
		return s.peerLinksOf(r)
	default:
		return s.shardLinks(r)
	}
}

// shardLinks are those of a proxy to a shard: to all nodes, or to one.
func (s *system) shardLinks(r *rand.Rand) linkSet {
	p, place := r.IntN(proxies), r.IntN(shards)
	nodes := s.nodes(place)
	name := shardNames[place]
	if n := r.IntN(2 * len(nodes)); n < len(nodes) && len(nodes) > 1 {
		nodes = nodes[n : n+1]
		name = nodes[0].spec.Name
	}
	return linkSet{
		name: s.proxies[p].name + " to " + name, affects: func(q, at int) bool { return q == p && at == place },
		parts: []string{s.proxies[p].name, shardNames[place], name},
		links: func() (out []*link) {
			for _, m := range nodes {
				out = append(out, m.link[p])
			}
			return out
		},
	}
}

func (s *system) coordinatorLinks(r *rand.Rand) linkSet {
	p := r.IntN(proxies)
	return linkSet{
		name: s.proxies[p].name + " to coordinator", affects: throughProxy(p), parts: []string{s.proxies[p].name, "coordinator"},
		links: func() []*link { return []*link{s.coordinator.link[p]} },
	}
}

// peerLinksOf are those between one node of the shard with three and the other two; half of the time its leader.
func (s *system) peerLinksOf(r *rand.Rand) linkSet {
	n, leader := r.IntN(3), r.IntN(2) == 0
	name := fmt.Sprintf("node %d of %s to the others", n+1, shardNames[tripled])
	if leader {
		name = "leader of " + shardNames[tripled] + " to the others"
	}
	return linkSet{
		name: name, affects: onShard(tripled), parts: []string{shardNames[tripled]}, reset: true,
		links: func() (out []*link) {
			nodes := s.nodes(tripled)
			one := nodes[n]
			if lead := s.leader(tripled); leader && lead != nil {
				one = lead
			}
			for _, m := range nodes {
				if m != one {
					// Those who do not say who they are ask for versions; they are cut off too.
					out = append(out, s.peerLink(m.id, one.id), s.peerLink(one.id, m.id), s.peerLink("", one.id))
				}
			}
			return out
		},
	}
}

// state makes the fault that puts the links into a state.
func (set linkSet) state(state linkState, how string) *fault {
	var links []*link
	return &fault{
		target: set.name + how, affects: set.affects, parts: set.parts,
		begin: func() error {
			links = set.links()
			for _, l := range links {
				l.set(state)
			}
			return nil
		},
		undo: func() error {
			for _, l := range links {
				l.set(linkState{})
				if set.reset && state.swallow != [2]bool{} {
					l.cut()
				}
			}
			return nil
		},
		await: nothing,
	}
}

// cut makes the fault that ends all connections, at its begin and at its end.
func (set linkSet) cut() *fault {
	var links []*link
	cut := func() error {
		for _, l := range links {
			l.cut()
		}
		return nil
	}
	return &fault{
		target: set.name, affects: set.affects, parts: set.parts,
		begin: func() error { links = set.links(); return cut() },
		undo:  cut, await: nothing,
	}
}

// schedule is the endless order of faults that a seed gives: every kind once in each turn, some together with another.
type schedule struct {
	r     *rand.Rand
	sys   *system
	kinds []kind
	turn  []int // those that are left of this turn
}

func (s *schedule) next() *fault {
	if len(s.turn) == 0 {
		s.turn = s.r.Perm(len(s.kinds))
	}
	k := s.kinds[s.turn[0]]
	s.turn = s.turn[1:]
	f := k.make(s.sys, s.r)
	f.kind = k.name
	return f
}

// round returns the faults of the next round and how long they last.
func (s *schedule) round(longest time.Duration) ([]*fault, time.Duration) {
	faults := []*fault{s.next()}
	lasts := 200*time.Millisecond + time.Duration(s.r.Int64N(int64(longest-200*time.Millisecond)))
	if s.r.IntN(3) > 0 {
		return faults, lasts
	}
	// A second one of any kind, which touches other things.
	k := s.kinds[s.r.IntN(len(s.kinds))]
	second := k.make(s.sys, s.r)
	second.kind = k.name
	for _, a := range faults[0].parts {
		for _, b := range second.parts {
			if a == b {
				return faults, lasts
			}
		}
	}
	return append(faults, second), lasts
}
