package shard

import (
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
	// patienceLasts is how long a shard is known to be slow after the last attempt that ran out of time.
	patienceLasts = 10 * time.Second
)

// patience is how long an attempt may take on one shard. It doubles when one was not enough, so a shard that is slow,
// or a large list, comes to an end.
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
	s    *shardState
	done codec.Completion
}

// maxFreeAttempts bounds what is kept for reuse.
const maxFreeAttempts = 256

// call sends a request that may be sent again. It ends with DeadlineExceeded when an attempt has had its time, which
// may be long before the shard timeout.
func (s *shardState) call(m codec.Method, req []byte, done codec.Completion) {
	c := s.c
	var a *attempt
	if n := len(c.freeAttempts); n > 0 {
		a = c.freeAttempts[n-1]
		c.freeAttempts = c.freeAttempts[:n-1]
	} else {
		a = new(attempt)
	}
	a.s, a.done = s, done
	c.tr.Call(s.cluster, m, req, s.patience.get(c.cfg.Now(), c.cfg.ShardTimeout), a)
}

// Complete implements codec.Completion.
func (a *attempt) Complete(resp []byte, st codec.Status, sent bool) {
	s, done := a.s, a.done
	if c := s.c; len(c.freeAttempts) < maxFreeAttempts {
		*a = attempt{}
		c.freeAttempts = append(c.freeAttempts, a)
	}
	if st.Code == codec.DeadlineExceeded {
		s.patience.ranOut(s.c.cfg.Now(), s.c.cfg.ShardTimeout)
	}
	done.Complete(resp, st, sent)
}
