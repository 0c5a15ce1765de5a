// Package tlsconn is TLS for connections of event loops: the standard crypto/tls over memory instead of a
// socket, and the certificates that it needs, read from files and read again when they change.
//
// Conn stands between a socket (which it does not know) and a codec.Conn: bytes of the socket go in by
// Receive, what is to be written comes out of Output. Only the handshake runs on a goroutine of its own,
// since crypto/tls keeps its state on the stack; a Gate bounds how many there are and how many compute at
// once. ServerFiles and ClientFiles make the tls.Configs.
//
// It stands beside codec, where both server (clients) and shard (members) can use it: neither imports the
// other. It is no part of codec itself, which has neither goroutines nor files.
package tlsconn
