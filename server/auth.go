package server

// authService is etcd's users and roles.
var authService = service{"etcdserverpb.Auth", []method{
	notBuilt("AuthEnable"),
	notBuilt("AuthDisable"),
	notBuilt("AuthStatus"),
	notBuilt("Authenticate"),
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
