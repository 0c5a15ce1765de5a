package server

import "spindle/shard"

// maintenanceService is what kube-apiserver and etcdctl ask about the state of the server.
var maintenanceService = service{"etcdserverpb.Maintenance", []method{
	unary("Status", shard.OpStatus),
	unary("Alarm", shard.OpAlarm),
	notBuilt("Defragment"),
	notBuilt("Hash"),
	notBuilt("HashKV"),
	notBuilt("Snapshot"),
	notBuilt("MoveLeader"),
	notBuilt("Downgrade"),
}}

// healthService is gRPC's own health check, served by health.go.
var healthService = service{"grpc.health.v1.Health", []method{
	notBuilt("Check"),
	notBuilt("List"),
	notBuilt("Watch"),
}}
