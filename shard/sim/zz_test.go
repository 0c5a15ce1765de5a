package sim
import ("testing";"fmt";"time")
func TestZZ(t *testing.T){
	n:=0
	for seed:=uint64(1); seed<=700 && n<40; seed++ {
		cfg := ConfigOf(seed)
		zz=func(o *op){ n++; fmt.Println(seed, (o.end-o.begin)/1e6, "ms", (o.begin-int64(time.Hour))/1e6, fmt.Sprintf("%T",o.req), o.st, clip(o.String())[:min(200,len(clip(o.String())))])}
		Go(cfg)
		zz=nil
	}
}
