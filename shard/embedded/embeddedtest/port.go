package embeddedtest

import (
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"testing"
)

// Ports of FreeAddr. They lie below those that kernels hand out by themselves (32768 and more on Linux), so nobody is
// given one by chance between FreeAddr and its use, or while a process that uses it is started again.
const (
	firstFreePort = 12000
	lastFreePort  = 31999

	// freePortTries is how many ports may be taken before FreeAddr fails the test.
	freePortTries = 1000
)

var givenPorts struct {
	sync.Mutex
	ports map[int]bool
}

// FreeAddr returns a host:port of 127.0.0.1 where nobody listens now, for what must know its address before it
// listens there, or listens there again. It gives no address twice in a process; that another process of tests
// chooses the same one at the same time is one chance in 20,000. Any goroutine.
func FreeAddr(t testing.TB) string {
	t.Helper()
	givenPorts.Lock()
	defer givenPorts.Unlock()
	for range freePortTries {
		port := firstFreePort + rand.IntN(lastFreePort-firstFreePort+1)
		if givenPorts.ports[port] {
			continue
		}
		l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
		if err != nil {
			continue // somebody listens there
		}
		l.Close()
		if givenPorts.ports == nil {
			givenPorts.ports = map[int]bool{}
		}
		givenPorts.ports[port] = true
		return l.Addr().String()
	}
	t.Fatalf("no free port between %d and %d", firstFreePort, lastFreePort)
	return ""
}
