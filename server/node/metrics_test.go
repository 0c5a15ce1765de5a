package node

import (
	"bytes"
	"fmt"
	"reflect"
	"testing"

	"spindle/shard"
)

// TestEveryCounterOfTheCoreIsShown: whatever the Core counts is on /metrics. (Doomed was not.)
func TestEveryCounterOfTheCoreIsShown(t *testing.T) {
	o := &shard.Observation{}
	v := reflect.ValueOf(&o.Core).Elem()
	for i := range v.NumField() {
		v.Field(i).SetUint(uint64(7000001 + i))
	}
	var b bytes.Buffer
	writeObservation(&b, o)
	for i := range v.NumField() {
		if n := bytes.Count(b.Bytes(), fmt.Appendf(nil, " %d\n", v.Field(i).Uint())); n != 1 {
			t.Errorf("%s is shown %d times", v.Type().Field(i).Name, n)
		}
	}
}
