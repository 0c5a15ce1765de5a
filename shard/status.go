package shard

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/protobuf/encoding/protowire"

	"spindle/codec"
)

// This file answers what is asked about the whole: Maintenance.Status and Alarm, Cluster.MemberList, Auth.AuthStatus.

// statusTimeout is how long a member may take to tell its status. kube-apiserver waits one second.
const statusTimeout = 800 * time.Millisecond

func hashString(s string) uint64 { return xxhash.Sum64String(s) }

// gather asks every member cluster the same, and calls done with the answers; one that failed is nil.
func (c *Core) gather(m codec.Method, req []byte, done func(replies [][]byte, errs []codec.Status)) {
	waiting := len(c.shards)
	replies := make([][]byte, waiting)
	errs := make([]codec.Status, waiting)
	for i, s := range c.shards {
		c.tr.Call(s.cluster, m, req, statusTimeout, completion(func(resp []byte, st codec.Status, _ bool) {
			errs[i] = st
			if st.Code == codec.OK {
				replies[i] = append([]byte{}, resp...)
			}
			if waiting--; waiting == 0 {
				done(replies, errs)
			}
		}))
	}
}

// memberStatus is etcdserverpb.StatusResponse, what is used of it.
type memberStatus struct {
	version                           string
	dbSize, dbInUse, quota            int64
	raftIndex, raftTerm, appliedIndex uint64
	errors                            []string
	storageVersion                    string
}

func (m *memberStatus) parse(msg []byte) {
	it := codec.Fields{Msg: msg}
	for it.Next() {
		f := &it.Field
		switch f.Num {
		case 2:
			m.version = string(f.Bytes)
		case 3:
			m.dbSize = int64(f.Val)
		case 5:
			m.raftIndex = f.Val
		case 6:
			m.raftTerm = f.Val
		case 7:
			m.appliedIndex = f.Val
		case 8:
			m.errors = append(m.errors, string(f.Bytes))
		case 9:
			m.dbInUse = int64(f.Val)
		case 11:
			m.storageVersion = string(f.Bytes)
		case 12:
			m.quota = int64(f.Val)
		}
	}
}

// submitStatus answers as one etcd: sizes, quotas and raft indexes are sums over the shards, the version
// and the storage version the oldest, the term the highest; the proxy is its own leader. A member that
// does not answer is named in errors.
func (c *Core) submitStatus(op *Op) {
	if !isMessage(op.Msg) {
		c.finish(op, errUnmarshal)
		return
	}
	c.gather(codec.MethodStatus, nil, func(replies [][]byte, errs []codec.Status) {
		var sum memberStatus
		answered := 0
		for i, r := range replies {
			if r == nil {
				sum.errors = append(sum.errors, fmt.Sprintf("member cluster %s does not answer: %s", c.shards[i].name, errs[i].Msg))
				continue
			}
			answered++
			var m memberStatus
			m.parse(r)
			if sum.version == "" || versionLess(m.version, sum.version) {
				sum.version = m.version
			}
			if sum.storageVersion == "" || versionLess(m.storageVersion, sum.storageVersion) {
				sum.storageVersion = m.storageVersion
			}
			sum.dbSize += m.dbSize
			sum.dbInUse += m.dbInUse
			sum.quota += m.quota
			sum.raftIndex += m.raftIndex
			sum.appliedIndex += m.appliedIndex
			sum.raftTerm = max(sum.raftTerm, m.raftTerm)
			for _, e := range m.errors {
				sum.errors = append(sum.errors, "member cluster "+c.shards[i].name+": "+e)
			}
		}
		if answered == 0 {
			c.finish(op, codec.ErrTimeout)
			return
		}
		hdr := c.hdr
		hdr.Revision = c.clock.Log().N()
		b := codec.AppendHeaderField(op.Resp[:0], &hdr)
		b = codec.AppendString(b, 2, sum.version)
		b = codec.AppendInt(b, 3, sum.dbSize)
		b = codec.AppendInt(b, 4, int64(hdr.MemberID))
		b = codec.AppendInt(b, 5, int64(sum.raftIndex))
		b = codec.AppendInt(b, 6, int64(sum.raftTerm))
		b = codec.AppendInt(b, 7, int64(sum.appliedIndex))
		for _, e := range sum.errors {
			b = codec.AppendString(b, 8, e)
		}
		b = codec.AppendInt(b, 9, sum.dbInUse)
		b = codec.AppendString(b, 11, sum.storageVersion)
		b = codec.AppendInt(b, 12, sum.quota)
		b, m := codec.BeginMessage(b, 13) // DowngradeInfo: none under way; etcd always has it
		op.Resp = codec.EndMessage(b, m)
		c.finish(op, codec.Status{})
	})
}

// versionLess compares dotted versions number by number.
func versionLess(a, b string) bool {
	x, y := strings.Split(a, "."), strings.Split(b, ".")
	for i := 0; i < len(x) && i < len(y); i++ {
		n, err1 := strconv.Atoi(x[i])
		m, err2 := strconv.Atoi(y[i])
		if err1 != nil || err2 != nil {
			return x[i] < y[i]
		}
		if n != m {
			return n < m
		}
	}
	return len(x) < len(y)
}

// submitAlarm answers the alarms of all members. Alarms are raised and disarmed on the members
// themselves; asking is what etcdctl's health check does.
func (c *Core) submitAlarm(op *Op) {
	action, alarm := int32(0), int32(0)
	it := codec.Fields{Msg: op.Msg}
	for it.Next() {
		switch f := &it.Field; {
		case f.Type != protowire.VarintType:
		case f.Num == 1:
			action = int32(f.Val)
		case f.Num == 3:
			alarm = int32(f.Val)
		}
	}
	switch {
	case it.Bad:
		c.finish(op, errUnmarshal)
		return
	case action != 0:
		c.finish(op, codec.Status{Code: codec.Unimplemented, Msg: "spindle: alarms are activated and disarmed on the member clusters, not through the proxy"})
		return
	}
	c.gather(codec.MethodAlarm, codec.AppendInt(nil, 3, int64(alarm)), func(replies [][]byte, errs []codec.Status) {
		hdr := c.hdr
		hdr.Revision = c.clock.Log().N()
		b := codec.AppendHeaderField(op.Resp[:0], &hdr)
		for i, r := range replies {
			if r == nil {
				c.finish(op, errs[i])
				return
			}
			it := codec.Fields{Msg: r}
			for it.Next() {
				if it.Field.Num == 2 {
					b = codec.AppendBytes(b, 2, it.Field.Bytes)
				}
			}
		}
		op.Resp = b
		c.finish(op, codec.Status{})
	})
}

// submitMemberList shows the proxy as the one member.
func (c *Core) submitMemberList(op *Op) {
	if !isMessage(op.Msg) {
		c.finish(op, errUnmarshal)
		return
	}
	hdr := c.hdr
	b := codec.AppendHeaderField(op.Resp[:0], &hdr)
	b, m := codec.BeginMessage(b, 2)
	b = codec.AppendInt(b, 1, int64(hdr.MemberID))
	b = codec.AppendString(b, 2, c.cfg.MemberName)
	for _, u := range c.cfg.ClientURLs {
		b = codec.AppendString(b, 3, u)
	}
	for _, u := range c.cfg.ClientURLs {
		b = codec.AppendString(b, 4, u)
	}
	op.Resp = codec.EndMessage(b, m)
	c.finish(op, codec.Status{})
}

// submitAuthStatus says that there is no authentication, at revision 1 as an etcd that never had one.
func (c *Core) submitAuthStatus(op *Op) {
	if !isMessage(op.Msg) {
		c.finish(op, errUnmarshal)
		return
	}
	hdr := c.hdr
	hdr.Revision = c.clock.Log().N()
	op.Resp = codec.AppendInt(codec.AppendHeaderField(op.Resp[:0], &hdr), 3, 1)
	c.finish(op, codec.Status{})
}

// isMessage says that msg is well-formed; of these requests' fields none is looked at.
func isMessage(msg []byte) bool {
	it := codec.Fields{Msg: msg}
	for it.Next() {
	}
	return !it.Bad
}

// memberID derives a stable member ID from how the proxy is named and reached.
func memberID(name string, urls []string) uint64 {
	return hashString(name+"\x00"+strings.Join(urls, ",")) | 1
}
