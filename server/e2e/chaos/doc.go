// Package chaos breaks a running Spindle, real processes all of them, and checks that its promises hold.
//
// Two proxies stand before three member clusters (one of three nodes) and a coordinator. Each is a process of its
// own: the proxies are the spindle binary, the others this test's binary, which runs as an etcd when its environment
// says so. Every connection goes through a relay in the test's process, which can delay it, cut it, swallow its bytes
// or hold them back.
//
// Clients write, read, watch and keep leases through both proxies all the time, while faults come in an order that
// the seed decides (SPINDLE_SEED repeats the order, not the timing). Whatever they asked and were answered is
// recorded, and checked when the faults are over: against one history of all events that explains every
// acknowledged write, read and watch, and, for some keys and independently of that, by porcupine.
//
// The check itself needs no processes; its own tests tamper with records and see that it notices.
package chaos
