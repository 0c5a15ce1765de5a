package sim

import (
	"bytes"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
	"spindle/shard"
)

// script is a world without clients, faults and checks, in which a test does one thing after another.
type script struct {
	*Run
	t *testing.T
}

func newScript(t *testing.T, cfg Config) *script {
	t.Helper()
	w := &script{newRun(cfg), t}
	for _, p := range w.proxies {
		w.wait("start", func() bool { return p.ready })
	}
	return w
}

// smallWorld is a world in which nothing goes wrong by itself.
func smallWorld(t *testing.T, proxies, ring int) *script {
	t.Helper()
	return newScript(t, Config{Seed: 1, Shards: 1, Proxies: proxies, Keys: 8, Base: time.Millisecond, RingSize: ring, MaxTxnOps: 128,
		MaxRequestBytes: defaultMaxRequestBytes, Window: 250 * time.Millisecond, Timeout: 5 * time.Second, SnapshotEvery: 100})
}

func (w *script) wait(what string, cond func() bool) {
	w.t.Helper()
	if !w.until(30*time.Second, cond) || !cond() {
		w.t.Fatalf("%s: %v", what, w.fault)
	}
}

func (w *script) call(p *proxy, kind shard.OpKind, req proto.Message) (rev int64, st codec.Status) {
	w.t.Helper()
	resp, st := w.ask(p, kind, req)
	if st.Code == codec.OK {
		rev = headerOf(resp).Revision
	}
	return rev, st
}

// put puts a key, and returns its revision.
func (w *script) put(p *proxy, key string) int64 {
	w.t.Helper()
	rev, st := w.call(p, shard.OpPut, &pb.PutRequest{Key: []byte(key), Value: []byte("v")})
	if st.Code != codec.OK {
		w.t.Fatal(st)
	}
	return rev
}

func (w *script) ask(p *proxy, kind shard.OpKind, req proto.Message) (resp proto.Message, st codec.Status) {
	w.t.Helper()
	msg, err := proto.Marshal(req)
	if err != nil {
		w.t.Fatal(err)
	}
	over := false
	p.core.Submit(&shard.Op{Kind: kind, Msg: msg, Done: func(s *shard.Op) {
		over, st = true, s.Status
		if resp = answerOf(req); st.Code == codec.OK {
			if err := proto.Unmarshal(s.Resp, resp); err != nil {
				w.t.Error(err)
			}
		}
	}})
	p.turn()
	w.wait("an answer", func() bool { return over })
	return resp, st
}

func (w *script) stream(p *proxy, req *pb.RangeRequest, take func(*pb.RangeResponse)) (st codec.Status) {
	w.t.Helper()
	msg, err := proto.Marshal(req)
	if err != nil {
		w.t.Fatal(err)
	}
	over := false
	wanted := false
	var last, copied []byte // the last chunk, whose bytes may not change before the next one is asked for
	s := &shard.RangeStream{Msg: msg, Chunk: func(_ *shard.RangeStream, chunk []byte) {
		last, copied = chunk, bytes.Clone(chunk)
		m := &pb.RangeStreamResponse{}
		if err := proto.Unmarshal(chunk, m); err != nil {
			w.t.Fatal(err)
		}
		if take != nil {
			take(m.RangeResponse)
		}
		wanted = true
	}, Done: func(s *shard.RangeStream) { over, st = true, s.Status }}
	p.core.OpenRange(s)
	p.turn()
	for !over {
		w.wait("a chunk", func() bool { return over || wanted })
		if !bytes.Equal(last, copied) {
			w.t.Fatal("a chunk has changed while its receiver had it")
		}
		if wanted && !over {
			wanted = false
			p.core.PullRange(s)
			p.turn()
		}
	}
	return st
}
