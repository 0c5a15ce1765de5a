// Package e2e holds black-box tests: Spindle is started as a user starts it, spoken to over the network
// by clients that know nothing of it (clientv3, generated gRPC stubs, the real etcdctl), and compared
// with an etcd that got the same requests. There is no code here but tests.
//
// Every random choice comes from a seed that the test logs; SPINDLE_SEED=n repeats a run.
package e2e
