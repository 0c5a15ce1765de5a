package load

import (
	"encoding/binary"
	"math/rand/v2"
	"strconv"
)

// namespaces is over how many namespaces the pods are spread.
const namespaces = 20

// keys makes the names of objects. It holds no state: the same number has the same name in every run, except
// that new objects carry the run's tag.
type keys struct {
	prefix string
	tag    string
	spread int // new objects' names are longer by 0 to spread-1 bytes
}

// filler is what longer names end with.
const filler = "-0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopq"

func appendPadded(dst []byte, n int64, width int) []byte {
	for w := int64(10); width > 1; width-- {
		if n < w {
			dst = append(dst, '0')
		}
		w *= 10
	}
	return strconv.AppendInt(dst, n, 10)
}

func (k *keys) in(dst []byte, resource string, n int64, name string) []byte {
	dst = append(dst[:0], k.prefix...)
	dst = append(dst, resource...)
	dst = append(dst, "/ns-"...)
	dst = appendPadded(dst, n%namespaces, 2)
	return append(append(dst, '/'), name...)
}

// pod is the n-th of the objects that exist before the load.
func (k *keys) pod(dst []byte, n int64) []byte {
	return appendPadded(k.in(dst, "pods", n, "pod-"), n, 8)
}

// fresh is the n-th object that client id makes.
func (k *keys) fresh(dst []byte, resource string, id int, n int64) []byte {
	dst = k.in(dst, resource, n, "new-")
	dst = append(append(dst, k.tag...), '-')
	dst = appendPadded(dst, int64(id), 5)
	dst = appendPadded(append(dst, '-'), n, 8)
	if k.spread > 1 {
		mix := (uint64(id)<<32 + uint64(n)) * 0x9e3779b97f4a7c15
		dst = append(dst, filler[:mix>>32%uint64(k.spread)]...)
	}
	return dst
}

// node is the Lease object of the n-th node.
func (k *keys) node(dst []byte, n int64) []byte {
	dst = append(append(dst[:0], k.prefix...), "leases/kube-node-lease/node-"...)
	return appendPadded(dst, n, 8)
}

// pods is the range of all pods.
func (k *keys) pods() (key, end []byte) {
	return []byte(k.prefix + "pods/"), []byte(k.prefix + "pods0")
}

// A value begins with a mark and the time when it was sent, in nanoseconds of the generator's clock: whoever
// watches can tell how old it is. The rest is random bytes, which do not compress.
const (
	stampMark = "sb01"
	stampSize = len(stampMark) + 8
)

func newValue(size int, seed uint64) []byte {
	v := make([]byte, size)
	r := rand.NewPCG(seed, 0x5b)
	for i := range v {
		v[i] = byte(r.Uint64())
	}
	copy(v, stampMark)
	return v
}

func stampValue(v []byte, now int64) {
	binary.BigEndian.PutUint64(v[len(stampMark):], uint64(now))
}

// sentAt reads the stamp of v.
func sentAt(v []byte) (now int64, ok bool) {
	if len(v) < stampSize || string(v[:len(stampMark)]) != stampMark {
		return 0, false
	}
	return int64(binary.BigEndian.Uint64(v[len(stampMark):])), true
}
