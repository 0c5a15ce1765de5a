package server

// leaseService is etcd's leases.
var leaseService = service{"etcdserverpb.Lease", []method{
	notBuilt("LeaseGrant"),
	notBuilt("LeaseRevoke"),
	notBuilt("LeaseKeepAlive"),
	notBuilt("LeaseTimeToLive"),
	notBuilt("LeaseLeases"),
}}

// lockService and electionService are etcd's services on top of leases.
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
