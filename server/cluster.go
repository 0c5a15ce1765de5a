package server

import "spindle/shard"

// clusterService shows the proxies as the members of one cluster; who they are is configuration.
var clusterService = service{"etcdserverpb.Cluster", []method{
	unary("MemberList", shard.OpMemberList),
	notBuilt("MemberAdd"),
	notBuilt("MemberRemove"),
	notBuilt("MemberUpdate"),
	notBuilt("MemberPromote"),
}}
