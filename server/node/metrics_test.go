package node

import (
	"bytes"
	"fmt"
	"reflect"
	"testing"

	"spindle/shard"
)

// TestEveryCounterIsShown: whatever the Core and its Clock count is on /metrics. (Doomed was not, nor half of the Clock's.)
func TestEveryCounterIsShown(t *testing.T) {
	o := &shard.Observation{}
	counts := map[string]reflect.Value{"Core": reflect.ValueOf(&o.Core).Elem(), "Clock": reflect.ValueOf(&o.Clock).Elem()}
	value := uint64(7000000)
	for _, v := range counts {
		for i := range v.NumField() {
			value++
			v.Field(i).SetUint(value)
		}
	}
	var b bytes.Buffer
	writeObservation(&b, o)
	for of, v := range counts {
		for i := range v.NumField() {
			if n := bytes.Count(b.Bytes(), fmt.Appendf(nil, " %d\n", v.Field(i).Uint())); n != 1 {
				t.Errorf("%s.%s is shown %d times", of, v.Type().Field(i).Name, n)
			}
		}
	}
}
