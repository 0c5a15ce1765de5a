package server

import "spindle/shard"

// leaseService is etcd's leases. LeaseKeepAlive is a stream: leasekeepalive.go.
var leaseService = service{"etcdserverpb.Lease", []method{
	unary("LeaseGrant", shard.OpLeaseGrant),
	unary("LeaseRevoke", shard.OpLeaseRevoke),
	notBuilt("LeaseKeepAlive"), // newEngine registers its handler
	unary("LeaseTimeToLive", shard.OpLeaseTimeToLive),
	unary("LeaseLeases", shard.OpLeaseLeases),
}}

// lockService and electionService are etcd's services on top of leases. Package recipes serves them; without
// it they are refused.
var lockService = service{"v3lockpb.Lock", []method{
	notBuilt("Lock"),
	notBuilt("Unlock"),
}}

var electionService = service{"v3electionpb.Election", []method{
	notBuilt("Campaign"),
	notBuilt("Proclaim"),
	notBuilt("Leader"),
	notBuilt("Observe"),
	notBuilt("Resign"),
}}
