// Package node wires one proxy together: the engine with its event loops, the pool of connections to the
// members, the core that makes batches and reads of what clients want, watches, and the HTTP server
// for operators. Everything it connects lives in its own package; here is only who knows whom, and the
// order of start and stop.
//
// The first event loop belongs to the core and to the pool: a request that came in on another loop
// crosses over once and its answer crosses back.
//
// Start: listeners first (a port in use is known at once), then the members. Clients that connect before
// the core has looked at all of them are turned away, so a balancer takes another proxy. Stop: clients
// first, then the core, the pool, the loops.
package node
