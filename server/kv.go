package server

import "spindle/shard"

// kvService is etcd's key-value API. RangeStream (new in 3.7) is served once ServeRangeStream was called.
var kvService = service{"etcdserverpb.KV", []method{
	unary("Range", shard.OpRange),
	unary("Put", shard.OpPut),
	unary("DeleteRange", shard.OpDeleteRange),
	unary("Txn", shard.OpTxn),
	unary("Compact", shard.OpCompact),
	notBuilt("RangeStream"),
}}

// watchService is served by the handler that is registered with Engine.HandleStream.
var watchService = service{"etcdserverpb.Watch", []method{
	notBuilt("Watch"),
}}
