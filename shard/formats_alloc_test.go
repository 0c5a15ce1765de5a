//go:build !race

package shard

import "testing"

func TestFormatsDoNotAllocate(t *testing.T) {
	stamped := append(AppendStamp(nil, 1000, 900), "value"...)
	record := AppendRecord(nil, goldenRecordValue())
	cache := NewCreateCache(1 << 10)
	part := NewPartition(goldenMapValue())
	key, end := []byte("/registry/pods/default/a"), []byte("/registry/pods/default0")
	buf := make([]byte, 0, 1024)
	shards := make([]int, 0, 8)
	in := goldenRecordValue()
	var r Record
	r.Parse(record)
	mod := int64(0)
	for name, f := range map[string]func(){
		"stamp":        func() { ParseStamp(stamped); AppendStamp(buf, 1000, 900) },
		"record":       func() { r.Parse(record); r.RevOfDelete(key); AppendRecord(buf, in) },
		"partition":    func() { part.ShardsOf(key, nil); part.ShardsOf(key, end); part.AppendShards(shards, key, end) },
		"create cache": func() { mod++; cache.Learn(key, 1, 1, mod); cache.Get(key); key[23]++; cache.Deleted(key, mod) },
	} {
		if n := testing.AllocsPerRun(1000, f); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
