package server

import (
	"spindle/codec"
	"spindle/shard"
)

// authService is etcd's users and roles. There are none, so it says what an etcd says whose authentication is not enabled: clients
// that have a password ask for a token first, and go on without one where they hear that they need none.
var authService = service{"etcdserverpb.Auth", []method{
	notBuilt("AuthEnable"),
	notBuilt("AuthDisable"),
	unary("AuthStatus", shard.OpAuthStatus),
	refused("Authenticate", codec.ErrAuthNotEnabled),
	notBuilt("UserAdd"),
	notBuilt("UserGet"),
	notBuilt("UserList"),
	notBuilt("UserDelete"),
	notBuilt("UserChangePassword"),
	notBuilt("UserGrantRole"),
	notBuilt("UserRevokeRole"),
	notBuilt("RoleAdd"),
	notBuilt("RoleGet"),
	notBuilt("RoleList"),
	notBuilt("RoleDelete"),
	notBuilt("RoleGrantPermission"),
	notBuilt("RoleRevokePermission"),
}}
