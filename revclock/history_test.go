package revclock

import (
	"context"
	"math/rand/v2"
	"sort"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// The bounds of what a coordinator holds after any number of ticks: history reaches back to the snapshot
// before the newest one, and a tick is some tens of bytes.
const (
	historyTicks   = 20_000
	historyMaxRevs = 3 * 1000 * 9 / 8 // two intervals, drawn up to an eighth longer, and one for what is under way
	historyMaxUsed = 2 << 20
)

// Two proxies tick on a real etcd: its history and its file stay small, because every snapshot compacts
// what lies behind the one before it.
func TestCoordinatorHistoryStaysSmall(t *testing.T) {
	if testing.Short() {
		t.Skip("runs an etcd for some seconds")
	}
	addr := startEtcd(t)
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	tr := &grpcTransport{t: t, conn: conn, loop: make(chan func(), 1000), ctx: ctx}
	t.Cleanup(func() { cancel(); conn.Close() })
	deadline := time.NewTimer(3 * time.Minute)
	defer deadline.Stop()
	var all []*etcdProxy
	fill(t, conn, 3)
	for id := byte(1); id <= 2; id++ {
		p := &etcdProxy{t: t}
		p.c = New(Config{Proxy: ID{id}, Shards: 3, Now: func() int64 { return time.Now().UnixNano() }, Rand: rand.New(rand.NewPCG(1, uint64(id)))}, tr, p)
		p.c.Start(StartArgs{Epoch: ID{5}, Clocks: make([]int64, 3)})
		all = append(all, p)
	}
	asked := make([]int, len(all))
	begun := time.Now()
	for done := 0; done < historyTicks; {
		done = 0
		wake := int64(0)
		for i, p := range all {
			done += len(p.granted)
			// One request at a time: each is a tick of its own.
			if p.started && asked[i] == len(p.granted) {
				p.c.Request(Request{Shard: asked[i] % 3, Count: 1, Filter: FilterAll})
				asked[i]++
			}
			// What was granted is committed at once, as a proxy's streams would say.
			for j := range 3 {
				p.c.Log().SetClock(j, p.c.Log().N())
			}
			p.c.Flush()
			if d := p.c.Deadline(); d > 0 && (wake == 0 || d < wake) {
				wake = d
			}
		}
		var timer <-chan time.Time
		if wake > 0 {
			timer = time.After(time.Duration(wake - time.Now().UnixNano()))
		}
		select {
		case f := <-tr.loop:
			f()
		case <-timer:
			for _, p := range all {
				p.c.Tick()
			}
		case <-deadline.C:
			t.Fatalf("%d ticks only: %s", done, all[0].c.LastError())
		}
	}
	kv := pb.NewKVClient(conn)
	head, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("t")})
	if err != nil {
		t.Fatal(err)
	}
	rev := head.Header.Revision
	if rev < historyTicks {
		t.Fatalf("the coordinator is at revision %d after %d ticks", rev, historyTicks)
	}
	var oldest int
	var st *pb.StatusResponse
	look := func() (small bool) {
		oldest = sort.Search(int(rev), func(i int) bool {
			_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("t"), Revision: int64(i + 1)})
			return err == nil
		}) + 1
		if st, err = pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{}); err != nil {
			t.Fatal(err)
		}
		return rev-int64(oldest) <= historyMaxRevs && st.DbSizeInUse <= historyMaxUsed
	}
	for range 100 { // the last compaction may be under way
		if look() {
			break
		}
		tr.pass(100 * time.Millisecond)
	}
	t.Logf("%d ticks in %v: revision %d, history from %d on, %d bytes used of %d", historyTicks, time.Since(begun).Round(time.Millisecond), rev, oldest, st.DbSizeInUse, st.DbSize)
	if kept := rev - int64(oldest); kept > historyMaxRevs {
		t.Errorf("the coordinator keeps %d revisions, more than %d", kept, historyMaxRevs)
	}
	if st.DbSizeInUse > historyMaxUsed {
		t.Errorf("the coordinator's database uses %d bytes, more than %d", st.DbSizeInUse, historyMaxUsed)
	}
}
