package server

import (
	"fmt"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// FuzzParseWatchRequest: what is accepted, and what it means, is what etcd's own types make of it.
func FuzzParseWatchRequest(f *testing.F) {
	for _, m := range []*pb.WatchRequest{
		{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("a"), RangeEnd: []byte("b"), StartRevision: -3,
			ProgressNotify: true, PrevKv: true, Fragment: true, WatchId: 9, Filters: []pb.WatchCreateRequest_FilterType{0, 1}}}},
		{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: -1}}},
		{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(append(b, b...))
	}
	f.Add([]byte{0x0a, 4, 0x28, 0, 0x28, 1})
	f.Fuzz(func(t *testing.T, msg []byte) {
		got, ok := parseWatchRequest(msg)
		var m pb.WatchRequest
		err := proto.Unmarshal(msg, &m)
		if ok != (err == nil) {
			t.Fatalf("%x: %v, protobuf says %v", msg, ok, err)
		}
		if !ok {
			return
		}
		want := watchRequest{}
		switch u := m.RequestUnion.(type) {
		case *pb.WatchRequest_CreateRequest:
			c := u.CreateRequest
			want = watchRequest{kind: watchCreate, key: c.Key, end: c.RangeEnd, start: c.StartRevision, id: c.WatchId,
				progress: c.ProgressNotify, prevKV: c.PrevKv, fragment: c.Fragment,
				noPut:    slices.Contains(c.Filters, pb.WatchCreateRequest_NOPUT),
				noDelete: slices.Contains(c.Filters, pb.WatchCreateRequest_NODELETE)}
		case *pb.WatchRequest_CancelRequest:
			want = watchRequest{kind: watchCancel, id: u.CancelRequest.WatchId}
		case *pb.WatchRequest_ProgressRequest:
			want = watchRequest{kind: watchProgress}
		}
		if fmt.Sprintf("%+q", []any{got}) != fmt.Sprintf("%+q", []any{want}) {
			t.Fatalf("%x, %v:\n got %+v\nwant %+v", msg, &m, got, want)
		}
	})
}
