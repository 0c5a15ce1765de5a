package shard

import (
	"math/rand/v2"
	"testing"
	"time"

	"spindle/codec"
)

// fileOf imitates an etcd's database file: it grows by what is written, takes free pages first, and never shrinks.
// Its size is told as the last commit left it.
type fileOf struct{ size, free, quota, told int64 }

func (f *fileOf) write(n int64) {
	fits := min(n, f.free)
	f.free -= fits
	f.size += n - fits
}

// refuses is etcd's own rule.
func (f *fileOf) refuses(cost int64) bool { return f.size+cost >= f.quota }

func (f *fileOf) status() *memberStatus {
	return &memberStatus{dbSize: f.told, dbInUse: max(f.told-f.free, 0), quota: f.quota}
}

// Whatever is written between two looks that are due, the member never refuses a batch, puts pass as long as there
// is plenty, and what frees space passes always.
func TestQuotaStaysBelowTheMembers(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	for range 2000 {
		f := fileOf{quota: 24<<20 + r.Int64N(4<<30)}
		q := quota{batch: 1600 << 10}
		now, commit := int64(0), int64(0)
		q.looked(f.status(), now)
		puts, compactions := 0, 0
		for step := range 4000 {
			n := r.Int64N(q.batch)
			if q.full {
				n = 300 // a record, a delete
				if r.IntN(20) == 0 {
					f.free += (f.size - f.free) / 2
					compactions++
				}
			} else {
				puts++
			}
			if f.refuses(n + 4096) {
				t.Fatalf("seed %d, step %d: etcd refuses %d bytes: %+v, %+v", seed, step, n, f, q)
			}
			f.write(n + r.Int64N(n/2+1))
			if now += r.Int64N(int64(20 * time.Millisecond)); now >= commit {
				f.told, commit = f.size, now+r.Int64N(int64(quotaSettle))
			}
			if q.wrote(int(n)) || r.IntN(20) == 0 {
				q.looked(f.status(), now)
			}
			if !q.full && f.size > f.quota {
				t.Fatalf("seed %d: not full at %+v", seed, f)
			}
			if q.full && f.size+quotaGrowth*q.written < f.quota/2 {
				t.Fatalf("seed %d: full at %+v: %+v", seed, f, q)
			}
		}
		if puts == 0 {
			t.Fatalf("seed %d: no puts", seed)
		}
	}
}

// A member without a quota, or one that does not tell, is never full; one with an alarm is, at any size.
func TestQuotaUnknownAndAlarm(t *testing.T) {
	var q quota
	q.looked(&memberStatus{dbSize: 1 << 40}, 0)
	if q.wrote(1<<30) || q.full || q.near() {
		t.Errorf("without a quota: %+v", q)
	}
	q.looked(&memberStatus{dbSize: 1 << 40, quota: -1}, 0)
	if q.full {
		t.Error("a quota that is switched off")
	}
	q = quota{}
	q.looked(&memberStatus{dbSize: 1 << 20, quota: 2 << 30, errors: []string{"memberID:1 alarm:NOSPACE "}}, 0)
	if !q.alarm || !q.near() {
		t.Errorf("alarm: %+v", q)
	}
	q.looked(&memberStatus{dbSize: 1 << 20, quota: 2 << 30}, 0)
	if q.alarm || q.near() {
		t.Errorf("alarm disarmed: %+v", q)
	}
}

// The largest of the last looks counts: another node of the cluster may have answered.
func TestQuotaCountsTheLargestNode(t *testing.T) {
	q := quota{batch: 1 << 20}
	for range 4 {
		q.looked(&memberStatus{dbSize: 100 << 20, dbInUse: 100 << 20, quota: 100 << 20}, 0)
		q.looked(&memberStatus{dbSize: 10 << 20, dbInUse: 10 << 20, quota: 100 << 20}, 0)
		q.looked(&memberStatus{dbSize: 10 << 20, dbInUse: 10 << 20, quota: 100 << 20}, 0)
		if !q.full {
			t.Fatalf("%+v", q)
		}
	}
}

// NOSPACE proves nothing about the batch that got it.
func TestNoSpaceIsNoProof(t *testing.T) {
	if definite(codec.ErrNoSpace) {
		t.Error("a NOSPACE error is taken for a proof that nothing was applied")
	}
}

// A full member is written to a second after it became full, or after a compaction, and then ever more rarely: its
// size shows what was freed, and what shows it does not fill it.
func TestQuotaFullMemberIsStirred(t *testing.T) {
	q := quota{full: true}
	look := int64(quotaLookNear)
	count := func(from, to time.Duration) (n int) {
		for now := int64(from); now < int64(to); now += look {
			if q.stir(now) {
				n++
			}
		}
		return n
	}
	if n := count(time.Second, 3*time.Second); n != 1 {
		t.Errorf("%d writes in the first two seconds", n)
	}
	if n := count(3*time.Second, time.Hour); n < 50 || n > 65 {
		t.Errorf("%d writes in the first hour", n)
	}
	q.compacted()
	if n := count(time.Hour, time.Hour+2*time.Second); n != 1 {
		t.Errorf("%d writes in the two seconds after a compaction", n)
	}
	for _, no := range []quota{{}, {full: true, alarm: true}} {
		if q = no; count(2*time.Hour, 3*time.Hour) != 0 {
			t.Errorf("full %v, alarm %v: it was written to", no.full, no.alarm)
		}
	}
}
