package e2e

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/status"
)

// soakAck is one acknowledged change: a put, or deletes. For a range over several shards, whose parts
// have revisions of their own, key is empty and deleted counts them all.
type soakAck struct {
	rev     int64
	key     string
	value   uint64
	deleted int64 // 0: a put
}

// soakRead is an answer to be compared with the history: of [key, end) at rev.
type soakRead struct {
	rev      int64
	key, end string
	limit    int64
	count    int64
	more     bool
	n        int
	sum      uint64 // over all keys shown
}

func (s *soak) conn(r *rand.Rand) *rpc { return s.conns[r.IntN(len(s.conns))] }

func (s *soak) record(acks ...soakAck) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.acks = append(s.acks, acks...)
	for _, a := range acks {
		raise(&s.newest, a.rev)
	}
}

// span is a random range of keys: one key (no end), a few, ten, a hundred, all.
func (s *soak) span(r *rand.Rand) (key, end string) {
	i := r.IntN(len(s.keys))
	switch r.IntN(6) {
	case 0, 1:
		return s.keys[i], ""
	case 2:
		i = min(i, len(s.keys)-2) // no range from the last key to itself: etcd refuses to watch what is empty
		return s.keys[i], s.keys[min(i+2+r.IntN(30), len(s.keys)-1)]
	case 3:
		p := s.keys[i][:len(soakPrefix)+2]
		return p, string(prefixEnd(p))
	case 4:
		p := s.keys[i][:len(soakPrefix)+1]
		return p, string(prefixEnd(p))
	default:
		return soakPrefix, string(prefixEnd(soakPrefix))
	}
}

// value is like no other that is ever written.
func (s *soak) value(r *rand.Rand, writer, n int) []byte {
	size := r.IntN(600)
	if r.IntN(200) == 0 {
		size = 16 << 10
	}
	return fmt.Appendf(nil, "%d.%d %s", writer, n, strings.Repeat("x", size))
}

// write is one writer.
func (s *soak) write(r *rand.Rand, writer int) {
	for n := 0; ; n++ {
		select {
		case <-s.stop:
			return
		case <-s.ctx.Done():
			return
		case <-s.tokens:
		}
		before := s.newest.Load()
		acks, err := s.writeOnce(r, s.conn(r), writer, n)
		for _, a := range acks {
			if err == nil && a.rev <= before {
				err = fmt.Errorf("a write got revision %d, but %d was known before it began", a.rev, before)
			}
		}
		if !s.check(err) {
			return
		}
		s.record(acks...)
	}
}

// writeOnce sends one request that may write, and tells what it did.
func (s *soak) writeOnce(r *rand.Rand, c *rpc, writer, n int) ([]soakAck, error) {
	key := s.keys[r.IntN(len(s.keys))]
	value := s.value(r, writer, n)
	switch p := r.IntN(100); {
	case p < 50:
		resp, err := c.kv.Put(s.ctx, &pb.PutRequest{Key: []byte(key), Value: value, PrevKv: p < 10})
		return []soakAck{{rev: resp.GetHeader().GetRevision(), key: key, value: s.sum(value)}}, err
	case p < 60:
		return s.deleteRange(c, key, "")
	case p < 62:
		return s.deleteRange(c, key, s.keys[min(r.IntN(len(s.keys)), r.IntN(len(s.keys)))])
	case p < 82:
		// Compare-and-swap as kube-apiserver does it, with what was read before.
		got, err := c.kv.Range(s.ctx, &pb.RangeRequest{Key: []byte(key)})
		if err != nil {
			return nil, err
		}
		var mod int64
		if len(got.Kvs) > 0 {
			mod = got.Kvs[0].ModRevision
		}
		req := &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: []byte(key), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: mod}}},
			Success: []*pb.RequestOp{putOp(key, string(value))},
			Failure: []*pb.RequestOp{rangeOp(key, "")},
		}
		if mod > 0 && p < 68 {
			req.Success = []*pb.RequestOp{deleteOp(key, "")}
		}
		return s.txn(c, req)
	case p < 90:
		// The slow road: the compare cannot be sent to the shard.
		return s.txn(c, &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: []byte(key), Result: pb.Compare_NOT_EQUAL, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: value}}},
			Success: []*pb.RequestOp{putOp(key, string(value))},
		})
	default:
		// Several keys of one shard.
		alike := s.alike[r.IntN(len(s.alike))]
		req := &pb.TxnRequest{}
		used := map[string]bool{}
		for i := range 2 + r.IntN(5) {
			k := alike[r.IntN(len(alike))]
			if used[k] {
				continue
			}
			used[k] = true
			if r.IntN(3) == 0 {
				req.Success = append(req.Success, deleteOp(k, ""))
			} else {
				req.Success = append(req.Success, putOp(k, fmt.Sprintf("%s %d", value, i)))
			}
		}
		if r.IntN(2) == 0 {
			req.Compare = []*pb.Compare{{Key: []byte(key), Result: pb.Compare_GREATER, Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: 1}}}
			if !contains(alike, key) {
				req.Compare[0].Key = []byte(alike[0])
			}
		}
		return s.txn(c, req)
	}
}

func contains(keys []string, key string) bool {
	for _, k := range keys {
		if k == key {
			return true
		}
	}
	return false
}

func (s *soak) deleteRange(c *rpc, key, end string) ([]soakAck, error) {
	if end != "" && end <= key {
		key, end = end, key+"\x00"
	}
	resp, err := c.kv.DeleteRange(s.ctx, &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end)})
	if err != nil || resp.Deleted == 0 {
		return nil, err
	}
	a := soakAck{rev: resp.Header.Revision, deleted: resp.Deleted}
	if end == "" {
		a.key = key
	}
	return []soakAck{a}, nil
}

func (s *soak) txn(c *rpc, req *pb.TxnRequest) ([]soakAck, error) {
	resp, err := c.kv.Txn(s.ctx, req)
	if err != nil || !resp.Succeeded {
		return nil, err
	}
	var acks []soakAck
	for i, op := range req.Success {
		if put := op.GetRequestPut(); put != nil {
			acks = append(acks, soakAck{rev: resp.Header.Revision, key: string(put.Key), value: s.sum(put.Value)})
		} else if n := resp.Responses[i].GetResponseDeleteRange().Deleted; n > 0 {
			acks = append(acks, soakAck{rev: resp.Header.Revision, key: string(op.GetRequestDeleteRange().Key), deleted: n})
		}
	}
	return acks, nil
}

// compact compacts every few seconds, sometimes nearly all, sometimes little.
func (s *soak) compact(r *rand.Rand) {
	for {
		s.pause(soakCompactEvery/2 + time.Duration(r.Int64N(int64(soakCompactEvery))))
		if s.stopped() {
			return
		}
		old, newest := s.compacted.Load(), s.newest.Load()
		if newest <= old { // nothing new yet
			continue
		}
		to := old + 1 + r.Int64N(newest-old)
		s.compacted.Store(to) // before it is asked: from now on anybody may see it
		_, err := s.conn(r).kv.Compact(s.ctx, &pb.CompactionRequest{Revision: to, Physical: r.IntN(4) == 0})
		if !s.check(err) {
			return
		}
		s.compactions.Add(1)
	}
}

// read reads the past and the present.
func (s *soak) read(r *rand.Rand) {
	for !s.stopped() {
		low, before := s.compacted.Load(), s.newest.Load()
		key, end := s.span(r)
		req := &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end)}
		if r.IntN(3) == 0 {
			req.Limit = 1 + r.Int64N(50)
		}
		if before > 0 && r.IntN(4) > 0 {
			req.Revision = max(1, low+r.Int64N(before-low+1)-r.Int64N(100)) // sometimes a compacted one
		}
		resp, err := s.conn(r).kv.Range(s.ctx, req)
		if err != nil && req.Revision > 0 && req.Revision < s.compacted.Load() && strings.Contains(status.Convert(err).Message(), "required revision has been compacted") {
			s.expiredReads.Add(1)
			continue
		}
		if !s.check(err) {
			return
		}
		if resp.Header.Revision < before {
			s.check(fmt.Errorf("a read at revision %d shows header %d, but %d was known before it began", req.Revision, resp.Header.Revision, before))
			return
		}
		s.addRead(req, resp)
		raise(&s.newest, resp.Header.Revision)
		s.pause(time.Duration(r.Int64N(int64(20 * time.Millisecond))))
	}
}

func (s *soak) addRead(req *pb.RangeRequest, resp *pb.RangeResponse) {
	rd := soakRead{rev: req.Revision, key: string(req.Key), end: string(req.RangeEnd), limit: req.Limit, count: resp.Count, more: resp.More, n: len(resp.Kvs)}
	if rd.rev == 0 {
		rd.rev = resp.Header.Revision
	}
	for _, kv := range resp.Kvs {
		rd.sum = rd.sum*31 + s.kvSum(kv)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads = append(s.reads, rd)
}
