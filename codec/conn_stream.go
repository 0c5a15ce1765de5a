package codec

import "slices"

// Streams of a Conn: their state, the table that finds them, and what happens when one ends.

// Phases of a Stream.
const (
	phaseDead  = iota // not in the table; events never fire, methods do nothing
	phaseLive         // known to the owner
	phasePlain        // server: a request that the Conn answers itself; the owner does not know it
	phaseDone         // server: Finish was called, or the Conn answers; the end waits for a window or the socket
)

// How the sending side ends, once the queue is empty.
const (
	endNone     = iota
	endTrailers // server: with st
	endData     // END_STREAM on DATA: CloseSend, or the body of an answer that is not gRPC
)

// streamState is what a Conn keeps of a stream. Owned by the Conn.
type streamState struct {
	phase, ending uint8
	headersSent   bool // server: response HEADERS; client: always
	headersRecv   bool // client: response HEADERS
	remoteClosed  bool // the peer sent END_STREAM
	localClosed   bool // we sent END_STREAM
	hold          bool
	noted         bool // in Conn.notes
	endNoted      bool // what Conn.notes has to report is the end
	wantDrained   bool // Send had to queue
	unprocessed   bool
	prefixN       uint8 // bytes of prefix that are here
	prefix        [prefixLen]byte
	dataEpoch     uint32 // Conn.epoch+1 when dataAt, the place of this stream's last DATA frame in out, holds
	dataAt        int

	recvWin     int64
	recvUnacked int64
	sendWin     int64
	bodyLeft    int64  // what content-length still promises, -1 without one
	swallowed   int    // phasePlain: body so far
	born        uint32 // Conn.ticks when it was opened

	msg      *buffer // message received in part, nil if none
	msgLen   int
	got      int    // bytes that came of msg
	encoding string // grpc-encoding of the peer's messages

	q          queue
	st         Status // endTrailers: how; phaseDead with noted: what OnEnd is to say
	ring       *ring
	prev, next *Stream
}

// ring is a circular list of streams that take turns. A stream is in at most one.
type ring struct{ head *Stream }

func (r *ring) push(s *Stream) {
	st := &s.stream
	if st.ring != nil {
		return
	}
	st.ring = r
	if r.head == nil {
		st.prev, st.next = s, s
		r.head = s
		return
	}
	tail := r.head.stream.prev
	st.prev, st.next = tail, r.head
	tail.stream.next, r.head.stream.prev = s, s
}

func (s *Stream) unring() {
	st := &s.stream
	r := st.ring
	if r == nil {
		return
	}
	if st.next == s {
		r.head = nil
	} else {
		st.prev.stream.next, st.next.stream.prev = st.next, st.prev
		if r.head == s {
			r.head = st.next
		}
	}
	st.ring, st.prev, st.next = nil, nil, nil
}

// streamTable finds streams by id: open addressing with linear probing. Identifiers of one peer are
// consecutive odd numbers, so id/2 is a hash without collisions among streams of like age.
type streamTable struct {
	slots []*Stream // length is a power of two, or 0
	n     int
}

func (t *streamTable) home(id uint32) int { return int(id>>1) & (len(t.slots) - 1) }

func (t *streamTable) get(id uint32) *Stream {
	if t.n == 0 {
		return nil
	}
	for i := t.home(id); ; i = (i + 1) & (len(t.slots) - 1) {
		if s := t.slots[i]; s == nil || s.ID == id {
			return s
		}
	}
}

func (t *streamTable) put(s *Stream) {
	if 4*(t.n+1) > 3*len(t.slots) {
		old := t.slots
		t.slots = make([]*Stream, max(4, 2*len(old)))
		t.n = 0
		for _, o := range old {
			if o != nil {
				t.insert(o)
			}
		}
	}
	t.insert(s)
}

func (t *streamTable) insert(s *Stream) {
	i := t.home(s.ID)
	for t.slots[i] != nil {
		i = (i + 1) & (len(t.slots) - 1)
	}
	t.slots[i] = s
	t.n++
}

func (t *streamTable) remove(id uint32) {
	if t.n == 0 {
		return
	}
	mask := len(t.slots) - 1
	i := t.home(id)
	for ; t.slots[i] == nil || t.slots[i].ID != id; i = (i + 1) & mask {
		if t.slots[i] == nil {
			return
		}
	}
	t.n--
	// Close the gap: move back what probing would no longer reach.
	for j := i; ; {
		j = (j + 1) & mask
		s := t.slots[j]
		if s == nil {
			break
		}
		if (j-t.home(s.ID))&mask >= (j-i)&mask {
			t.slots[i] = s
			i = j
		}
	}
	t.slots[i] = nil
}

// shrink lets a large empty table go.
func (t *streamTable) shrink() {
	if t.n == 0 && len(t.slots) > 16 {
		t.slots = nil
	}
}

// sorted returns all streams by id. It allocates; for rare events only.
func (t *streamTable) sorted() []*Stream {
	all := make([]*Stream, 0, t.n)
	for _, s := range t.slots {
		if s != nil {
			all = append(all, s)
		}
	}
	slices.SortFunc(all, func(a, b *Stream) int { return int(a.ID) - int(b.ID) })
	return all
}

// closedRing remembers the last streams that ended: a late frame for a stream that this side ended is
// normal, one for a stream that the peer ended is an error (RFC 9113 5.1). An entry is the identifier
// shifted by one, and a bit that says which.
type closedRing struct {
	ids [closedRingSize]uint32
	pos uint8
}

func (r *closedRing) add(id uint32, byUs bool) {
	x := id << 1
	if byUs {
		x |= 1
	}
	r.ids[r.pos%closedRingSize] = x
	r.pos++
}

func (r *closedRing) find(id uint32) (known, byUs bool) {
	for _, x := range r.ids {
		if x>>1 == id {
			return true, x&1 != 0
		}
	}
	return false, false
}

// newStream takes an empty Stream into the table.
func (c *Conn) newStream(id uint32) *Stream {
	var s *Stream
	if n := len(c.free); n > 0 {
		s = c.free[n-1]
		c.free[n-1] = nil
		c.free = c.free[:n-1]
	} else {
		s = new(Stream)
	}
	s.ID = id
	st := &s.stream
	st.phase = phaseLive
	st.recvWin = int64(c.cfg.StreamWindow)
	st.sendWin = c.peerInit
	st.born = c.ticks
	st.bodyLeft = -1
	c.streams.put(s)
	return s
}

// release takes s out of everything; nothing happens for it any more. It is recycled when no event handler
// can be looking at it.
func (c *Conn) release(s *Stream) {
	st := &s.stream
	if st.phase == phaseDead {
		return
	}
	st.phase = phaseDead
	c.idle = min(idleFrameBurst, c.idle+idlePerStream)
	c.streams.remove(s.ID)
	s.unring()
	c.queued -= st.q.n
	c.queueMem -= st.q.mem
	st.q.drop()
	c.dropPartial(s)
	// Ended by us: the peer may not know yet, because it had not ended its side.
	c.closedIDs.add(s.ID, !st.remoteClosed)
	if st.endNoted {
		return // an end that is still to be reported; deliver recycles it
	}
	c.bury(s)
}

func (c *Conn) bury(s *Stream) {
	if c.depth > 0 {
		c.zombies = append(c.zombies, s)
		return
	}
	c.recycle(s)
}

func (c *Conn) recycle(s *Stream) {
	*s = Stream{}
	if len(c.free) < maxFreeStreams {
		c.free = append(c.free, s)
	}
}

// end releases s and reports it: OnCancel, or OnEnd with st.
func (c *Conn) end(s *Stream, st Status, unprocessed bool) {
	live := s.stream.phase == phaseLive
	c.release(s)
	if !live {
		return
	}
	c.depth++
	if c.client {
		c.cli.OnEnd(s, st, unprocessed)
	} else {
		c.srv.OnCancel(s)
	}
	c.leave()
}

// noteItem is an entry of Conn.notes. The id tells whether s was recycled meanwhile.
type noteItem struct {
	s  *Stream
	id uint32
}

// note remembers that s has something to report which must not be reported from here.
func (c *Conn) note(s *Stream) {
	if !s.stream.noted {
		s.stream.noted = true
		c.notes = append(c.notes, noteItem{s, s.ID})
	}
}

// deliver reports what note remembered. Handlers may cause further notes.
func (c *Conn) deliver() {
	for i := 0; i < len(c.notes); i++ {
		it := c.notes[i]
		s, st := it.s, &it.s.stream
		if s.ID != it.id || !st.noted {
			continue
		}
		st.noted = false
		switch {
		case st.phase == phaseLive && st.wantDrained && st.q.n == 0:
			st.wantDrained = false
			if !c.client {
				c.srv.OnDrained(s)
			}
		case st.endNoted:
			st.endNoted = false
			if c.client {
				c.cli.OnEnd(s, st.st, st.unprocessed)
			} else {
				c.srv.OnCancel(s)
			}
			c.bury(s)
		}
	}
	clear(c.notes)
	c.notes = c.notes[:0]
}
