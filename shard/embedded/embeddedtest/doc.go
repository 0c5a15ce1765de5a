// Package embeddedtest starts etcd clusters of several nodes inside the process, for tests that let nodes fail:
// stopped or killed and started again with their data, cut off from their peers, far away, or mute. Only tests
// import it.
//
// Every address that anybody knows, of clients and of peers, is that of a Relay which lives as long as the test. So
// addresses stay over restarts, no port can be taken by somebody else meanwhile, and a test can harm the way between
// a client and a node.
package embeddedtest
