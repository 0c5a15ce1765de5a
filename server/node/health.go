package node

import (
	"time"

	"spindle/codec"
	"spindle/shard"
)

// versionTimeout bounds the question to the members for their version.
const versionTimeout = time.Second

// statusVersion is the field number of version in etcdserverpb.StatusResponse.
const statusVersion = 2

// health is the node as the metrics server sees it. Its methods are called on goroutines of net/http.
type health Node

// Ready implements server.Health.
func (h *health) Ready() (bool, string) { return (*Node)(h).Status() }

// EtcdVersion implements server.Health: the version of the oldest member, asked for anew; when they do
// not answer the last one known, "" at first.
func (h *health) EtcdVersion() string {
	n := (*Node)(h)
	if ready, _ := n.Status(); !ready {
		return n.lastVersion()
	}
	answer := make(chan struct{})
	n.engine.Loops()[0].Post(func() {
		op := shard.AcquireOp()
		op.Kind = shard.OpStatus
		op.Done = func(op *shard.Op) {
			if op.Status.Code == codec.OK {
				if v := parseVersion(op.Resp); v != "" {
					n.version.Store(&v)
				}
			}
			shard.ReleaseOp(op)
			close(answer)
		}
		n.core.Submit(op)
	})
	timeout := time.NewTimer(versionTimeout)
	defer timeout.Stop()
	select {
	case <-answer:
	case <-timeout.C:
	}
	return n.lastVersion()
}

func (n *Node) lastVersion() string {
	if v := n.version.Load(); v != nil {
		return *v
	}
	return ""
}

func parseVersion(msg []byte) string {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		if it.Field.Num == statusVersion {
			return string(it.Field.Bytes)
		}
	}
	return ""
}
