package shard

import (
	"slices"
	"time"

	"spindle/codec"
)

// This file bounds one attempt at a request to a shard. A node may take a request and never answer it: one that is cut
// off, or one that has passed the request on to a leader that has just died. Another copy of the request, which goes
// to another node, then helps at once; so an attempt has less time than the client. All that is sent this way may be
// sent again: reads, and batches, whose guard lets one copy commit.

const (
	// firstPatience is how long an attempt may take before anything is known of the shard: an answer takes
	// milliseconds, a bad disk some hundred of them.
	firstPatience = time.Second
	// attemptShare is the part of the shard timeout that an attempt may take at most, so that there is time for a second one.
	attemptShare = 2
	// patienceLasts is how long a shard is known to be slow after the last attempt that ran out of time.
	patienceLasts = 10 * time.Second
	// largeRate is how many bytes a second of a large answer an attempt has time for besides, less than a tenth of what a
	// member does alone: the time until its first byte, which is there when the last one was read. From then on the answer
	// is waited for as long as it comes (poolCall.due).
	largeRate = 8 << 20
)

// patience is how long an attempt of one kind may take on one shard. It doubles when one was not enough, so a shard that
// is slow, or a large list, comes to an end.
type patience struct {
	span   time.Duration // 0: firstPatience
	raised int64         // ns; when it was doubled last
}

// get returns the time that an attempt has, at most limit.
func (p *patience) get(now int64, limit time.Duration) time.Duration {
	if p.span > 0 && now-p.raised > int64(max(patienceLasts, 2*p.span)) {
		p.span = 0
	}
	if p.span == 0 {
		return min(firstPatience, limit)
	}
	return min(p.span, limit)
}

// ranOut is told that an attempt had not enough. Those that began before the last doubling say nothing new.
func (p *patience) ranOut(now int64, limit time.Duration) {
	span := p.get(now, limit)
	if p.span > 0 && now-p.raised < int64(span/2) {
		return
	}
	p.span, p.raised = min(2*span, limit), now
}

// attempt is one request under way. They are reused.
type attempt struct {
	s     *shardState
	done  codec.Completion
	large bool
}

// maxFreeAttempts bounds what is kept for reuse.
const maxFreeAttempts = 256

// call sends a request that may be sent again. It ends with DeadlineExceeded, or Unavailable, when an attempt has had its time, which
// may be long before the shard timeout. Of the two only DeadlineExceeded counts as a slow shard: a node that has become mute must not make
// the next attempts patient, for the next node may be mute, too.
func (s *shardState) call(m codec.Method, req []byte, done codec.Completion) {
	s.attempt(m, req, 0, done, false)
}

// callLarge is call for lists, their pages, and whatever else may have a large answer, which takes its time on a busy member and
// says nothing about batches. size is about what is expected, in bytes; 0 if that is not known.
func (s *shardState) callLarge(m codec.Method, req []byte, size int64, done codec.Completion) {
	s.attempt(m, req, time.Duration(min(size, maxEstimate))*time.Second/largeRate, done, true)
}

// readsMuch says whether what p reads on its shard at once may be of any size: ranges without a small limit. A member may need its time
// for that, which says nothing about other requests.
func (p *Plan) readsMuch() bool {
	if p.Kind == OpRange {
		r := &p.ranges[0]
		return len(p.ops[0].end) > 0 && !r.countOnly && (r.limit <= 0 || r.limit > maxBatchedKeys || !r.plain())
	}
	many := func(iv Interval) bool { return len(iv.End) > 0 }
	return slices.ContainsFunc(p.Reads, many) || slices.ContainsFunc(p.Writes, many)
}

// patienceFor returns the patience with attempts of a kind, and its limit. A large read that half of the shard timeout was not
// enough for gets all of it. It begins as any other: a node that keeps what it takes keeps lists, too.
func (s *shardState) patienceFor(large bool) (p *patience, limit time.Duration) {
	if large {
		return &s.largePatience, s.c.cfg.ShardTimeout
	}
	return &s.patience, s.c.cfg.ShardTimeout / attemptShare
}

func (s *shardState) attempt(m codec.Method, req []byte, more time.Duration, done codec.Completion, large bool) {
	c := s.c
	var a *attempt
	if n := len(c.freeAttempts); n > 0 {
		a = c.freeAttempts[n-1]
		c.freeAttempts = c.freeAttempts[:n-1]
	} else {
		a = new(attempt)
	}
	a.s, a.done, a.large = s, done, large
	p, limit := s.patienceFor(large)
	c.tr.Call(s.cluster, m, req, min(p.get(c.cfg.Now(), limit)+more, limit), a)
}

// Rewriter implements codec.Receiving.
func (a *attempt) Rewriter() codec.Rewriter {
	if r, ok := a.done.(codec.Receiving); ok && a.large {
		return r.Rewriter()
	}
	return nil
}

// Reserved implements codec.Receiving.
func (a *attempt) Reserved() int {
	if r, ok := a.done.(codec.Receiving); ok && a.large {
		return r.Reserved()
	}
	return 0
}

// Complete implements codec.Completion.
func (a *attempt) Complete(resp []byte, st codec.Status, sent bool) {
	s, done, large := a.s, a.done, a.large
	if c := s.c; len(c.freeAttempts) < maxFreeAttempts {
		*a = attempt{}
		c.freeAttempts = append(c.freeAttempts, a)
	}
	if st.Code == codec.DeadlineExceeded {
		p, limit := s.patienceFor(large)
		p.ranOut(s.c.cfg.Now(), limit)
	}
	done.Complete(resp, st, sent)
}
