package sim

import (
	"encoding/binary"
	"fmt"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"spindle/codec"
)

// This file turns messages into short text for the trace of a run. It is used only when one is asked for.

func describeKey(key, end []byte) string {
	k := strings.ReplaceAll(string(key), "\x00", "`")
	switch {
	case len(end) == 0:
		return k
	case string(end) == "\x00":
		return "[" + k + "..)"
	}
	return "[" + k + ".." + strings.ReplaceAll(string(end), "\x00", "`") + ")"
}

func describeValue(key, v []byte) string {
	switch {
	case string(key) == keyClock:
		if r, err := parseRecord(v); err == nil {
			return fmt.Sprintf("{%d..%d spare=%v kind=%d proxy=%x batch=%d deletes=%d}", r.first, r.last, r.spare, r.kind, r.proxy[:2], r.batch, len(r.deletes))
		}
	case len(key) > 0 && key[0] == 0:
		return fmt.Sprintf("<%d bytes>", len(v))
	case string(key) == "t" || string(key) == "s" || string(key) == "e":
		if len(v) > 24 {
			return fmt.Sprintf("%x..", v[:24])
		}
		return fmt.Sprintf("%x", v)
	}
	if mod, create, _, user, err := parseStamp(v); err == nil {
		return fmt.Sprintf("%s@%d/%d", user, mod, create)
	}
	return fmt.Sprintf("%.40q", v)
}

func describeOp(b *strings.Builder, op *pb.RequestOp) {
	switch v := op.Request.(type) {
	case *pb.RequestOp_RequestRange:
		r := v.RequestRange
		fmt.Fprintf(b, "get %s", describeKey(r.Key, r.RangeEnd))
		if r.Revision != 0 {
			fmt.Fprintf(b, "@L%d", r.Revision)
		}
	case *pb.RequestOp_RequestPut:
		fmt.Fprintf(b, "put %s=%s", describeKey(v.RequestPut.Key, nil), describeValue(v.RequestPut.Key, v.RequestPut.Value))
	case *pb.RequestOp_RequestDeleteRange:
		fmt.Fprintf(b, "del %s", describeKey(v.RequestDeleteRange.Key, v.RequestDeleteRange.RangeEnd))
	case *pb.RequestOp_RequestTxn:
		describeTxn(b, v.RequestTxn)
	}
}

func describeTxn(b *strings.Builder, t *pb.TxnRequest) {
	b.WriteString("txn(")
	for _, c := range t.Compare {
		target := strings.ToLower(c.Target.String())
		var x any
		switch u := c.TargetUnion.(type) {
		case *pb.Compare_Value:
			x = fmt.Sprintf("%x", u.Value)
			if len(u.Value) == 8 {
				x = fmt.Sprintf("R%d", int64(binary.BigEndian.Uint64(u.Value)))
			}
		case *pb.Compare_ModRevision:
			x = u.ModRevision
		case *pb.Compare_CreateRevision:
			x = u.CreateRevision
		case *pb.Compare_Version:
			x = u.Version
		}
		fmt.Fprintf(b, "%s(%s)%s%v ", target, describeKey(c.Key, c.RangeEnd), [...]string{"=", ">", "<", "!="}[c.Result], x)
	}
	b.WriteString("?")
	for _, op := range t.Success {
		b.WriteString(" ")
		describeOp(b, op)
		b.WriteString(";")
	}
	if len(t.Failure) > 0 {
		b.WriteString(" else")
		for _, op := range t.Failure {
			b.WriteString(" ")
			describeOp(b, op)
			b.WriteString(";")
		}
	}
	b.WriteString(")")
}

func describeRequest(m codec.Method, req []byte) string {
	var b strings.Builder
	switch m {
	case codec.MethodRange:
		r := &pb.RangeRequest{}
		if proto.Unmarshal(req, r) == nil {
			describeOp(&b, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}})
		}
	case codec.MethodTxn:
		r := &pb.TxnRequest{}
		if proto.Unmarshal(req, r) == nil {
			describeTxn(&b, r)
		}
	default:
		b.WriteString(codec.MethodPath(m))
	}
	return b.String()
}

func describeResponse(m codec.Method, resp []byte, st codec.Status) string {
	if st.Code != codec.OK {
		return fmt.Sprintf("%v %q", st.Code, st.Msg)
	}
	var b strings.Builder
	switch m {
	case codec.MethodRange:
		r := &pb.RangeResponse{}
		if proto.Unmarshal(resp, r) == nil {
			fmt.Fprintf(&b, "L%d n=%d", r.Header.GetRevision(), r.Count)
			describeKVs(&b, r.Kvs)
		}
	case codec.MethodTxn:
		r := &pb.TxnResponse{}
		if proto.Unmarshal(resp, r) == nil {
			describeTxnResponse(&b, r)
		}
	default:
		b.WriteString("ok")
	}
	return b.String()
}

func describeTxnResponse(b *strings.Builder, r *pb.TxnResponse) {
	fmt.Fprintf(b, "L%d %v", r.Header.GetRevision(), r.Succeeded)
	for _, op := range r.Responses {
		switch v := op.Response.(type) {
		case *pb.ResponseOp_ResponseRange:
			b.WriteString(" [")
			describeKVs(b, v.ResponseRange.Kvs)
			b.WriteString(" ]")
		case *pb.ResponseOp_ResponseDeleteRange:
			fmt.Fprintf(b, " deleted=%d", v.ResponseDeleteRange.Deleted)
		case *pb.ResponseOp_ResponseTxn:
			b.WriteString(" (")
			describeTxnResponse(b, v.ResponseTxn)
			b.WriteString(")")
		}
	}
}

func describeKVs(b *strings.Builder, kvs []*mvccpb.KeyValue) {
	for i, kv := range kvs {
		if i == 8 {
			b.WriteString(" ...")
			return
		}
		fmt.Fprintf(b, " %s=%s@L%d", describeKey(kv.Key, nil), describeValue(kv.Key, kv.Value), kv.ModRevision)
	}
}

func describeWatchRequest(req []byte) string {
	r := &pb.WatchRequest{}
	if proto.Unmarshal(req, r) != nil {
		return "?"
	}
	if c := r.GetCreateRequest(); c != nil {
		return fmt.Sprintf("%s from L%d", describeKey(c.Key, c.RangeEnd), c.StartRevision)
	}
	return "progress or cancel"
}

func describeWatchResponse(m []byte) string {
	r := &pb.WatchResponse{}
	if proto.Unmarshal(m, r) != nil {
		return "?"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "L%d", r.Header.GetRevision())
	if r.Created {
		b.WriteString(" created")
	}
	if r.Canceled {
		fmt.Fprintf(&b, " canceled compact=%d", r.CompactRevision)
	}
	for i, e := range r.Events {
		if i == 12 {
			b.WriteString(" ...")
			break
		}
		if e.Type == mvccpb.Event_DELETE {
			fmt.Fprintf(&b, " -%s@L%d", describeKey(e.Kv.Key, nil), e.Kv.ModRevision)
		} else {
			fmt.Fprintf(&b, " %s=%s@L%d", describeKey(e.Kv.Key, nil), describeValue(e.Kv.Key, e.Kv.Value), e.Kv.ModRevision)
		}
	}
	return b.String()
}
