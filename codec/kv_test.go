package codec

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// TestParseKVRoads: what the short road takes for a KeyValue is the one that the general road finds, whatever the bytes; and it takes
// those that are.
func TestParseKVRoads(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 9))
	for round := range 20_000 {
		kv := KV{Key: make([]byte, 1+rng.IntN(200)), Value: make([]byte, rng.IntN(1+rng.IntN(400)))}
		for _, v := range []*int64{&kv.CreateRevision, &kv.ModRevision, &kv.Version, &kv.Lease} {
			*v = rng.Int64() >> rng.IntN(64)
		}
		msg := AppendKV(nil, &kv)
		whole := rng.IntN(2) == 0
		if !whole {
			for range 1 + rng.IntN(3) {
				msg[rng.IntN(len(msg))] = byte(rng.Uint32())
			}
			msg = msg[:rng.IntN(len(msg)+1)]
		}
		var short KV
		taken := parsePlainKV(msg, &short)
		if whole && !taken {
			t.Fatalf("seed %d, round %d: not taken: %x", seed, round, msg)
		}
		long, ok := parseAnyKV(msg)
		if taken && (!ok || !bytes.Equal(short.Key, long.Key) || !bytes.Equal(short.Value, long.Value) || short.CreateRevision != long.CreateRevision ||
			short.ModRevision != long.ModRevision || short.Version != long.Version || short.Lease != long.Lease) {
			t.Fatalf("seed %d, round %d: %x is %+v, and %+v, %v", seed, round, msg, short, long, ok)
		}
	}
}
