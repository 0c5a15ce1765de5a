package load

import (
	"crypto/tls"
	"errors"
	"net"

	"spindle/codec"
)

// adviceFor says what to do about a connection that could not be made, "" where nobody knows. It goes behind the error.
func adviceFor(err error, secure bool) string {
	var certificate *tls.CertificateVerificationError
	var status codec.Status
	op := new(net.OpError)
	switch errors.As(err, &op); {
	case op.Op == "dial":
		return " (--endpoints: where the servers are)"
	case errors.As(err, &certificate):
		return " (--cacert: the CA of the server's certificate; the URL must have the host that it is for)"
	case op.Op == "remote error":
		return " (is it an etcd? --cert and --key: the certificate that it wants to see)"
	case errors.As(err, &status):
		return ""
	case secure:
		return " (is it an etcd? without TLS its URL begins with http://)"
	}
	return " (is it an etcd? with TLS its URL begins with https://)"
}

// userEmpty is etcd's rpctypes.ErrGRPCUserEmpty: it wants to know who asks.
const userEmpty = "etcdserver: user name is empty"

// refusal says what to do about an answer that every further request would get, too: the load is not worth its time. "": go on.
func refusal(st codec.Status) string {
	switch {
	case st.Msg == userEmpty:
		return "--user: who asks"
	case st.Code == codec.PermissionDenied:
		return "grant the user a role that may read and write below --prefix, and everything for --watch-all"
	case st.Code == codec.Unauthenticated:
		return "--user: who asks; a token does not outlive its time, or the server"
	case st.Code == codec.Unimplemented:
		return "is it an etcd that knows all of --workload?"
	}
	return ""
}

// refused ends the load if st is such an answer, and says whether.
func (r *run) refused(st codec.Status) bool {
	what := refusal(st)
	if what == "" {
		return false
	}
	r.abort("the server refuses the load: %s (%s)", st.Msg, what)
	return true
}
