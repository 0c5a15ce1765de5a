package tlsconn

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// ExplainClient says why a client's connection ended, in a sentence for the operator of the proxy.
func ExplainClient(err error) string {
	var verify *tls.CertificateVerificationError
	var header tls.RecordHeaderError
	switch text := err.Error(); {
	case errors.Is(err, ErrPlainText), errors.As(err, &header):
		return "the client speaks plain text on a TLS port: it must use https:// here"
	case errors.Is(err, ErrNoHTTP2), strings.Contains(text, "unsupported application protocols"):
		return "the client does not offer HTTP/2 (ALPN h2): only gRPC is spoken here"
	case errors.As(err, &verify):
		return "the client's certificate is refused: " + explainCert(verify, "--trusted-ca-file", "")
	case strings.Contains(text, "didn't provide a certificate"):
		return "the client shows no certificate, and --client-cert-auth or --trusted-ca-file demands one"
	case fromPeer(err):
		return "the client refuses the connection (" + alertText(err) + "): if it is about the certificate, the client must trust the CA of --cert-file, and that certificate must be for the name that the client uses"
	case errors.Is(err, io.EOF):
		return "the client closed the connection"
	default:
		return text
	}
}

// ExplainServer says why the connection to a member ended; name is what its certificate must be for. It returns ""
// for an error that has nothing to do with TLS.
func ExplainServer(err error, name string) string {
	var verify *tls.CertificateVerificationError
	var header tls.RecordHeaderError
	switch {
	case errors.As(err, &verify):
		return "its certificate is refused: " + explainCert(verify, "--shard-cacert", name)
	case errors.As(err, &header), errors.Is(err, ErrPlainText):
		return "it does not speak TLS: is it to be http:// ?"
	case errors.Is(err, ErrNoHTTP2):
		return "it speaks TLS without HTTP/2 (ALPN h2): is this the client port of an etcd?"
	case fromPeer(err):
		return "it refuses the TLS connection (" + alertText(err) + "): does it ask for a certificate? --shard-cert and --shard-key must be signed by a CA that it trusts, and not be expired"
	case strings.HasPrefix(err.Error(), "tls: "), strings.HasPrefix(err.Error(), "x509: "):
		return err.Error()
	}
	return ""
}

func explainCert(err *tls.CertificateVerificationError, caFlag, name string) string {
	var authority x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var host x509.HostnameError
	subject := ""
	if len(err.UnverifiedCertificates) > 0 {
		subject = fmt.Sprintf("%q ", err.UnverifiedCertificates[0].Subject.String())
	}
	switch {
	case errors.As(err, &authority):
		return subject + "is not signed by a CA in " + caFlag + ": add its CA there, or renew the certificate"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		c := invalid.Cert
		return fmt.Sprintf("%sis valid from %s to %s only: renew it, or set the clock right", subject, c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
	case errors.As(err, &host):
		return fmt.Sprintf("%sis not for %q (%v): use a name that it is for, or renew it with this one", subject, name, host)
	}
	return subject + err.Err.Error()
}

// Broke says that err, of a Conn, is the other side's fault: it broke TLS, or was refused. It did not just go away, nor
// did it refuse us.
func Broke(err error) bool {
	return err != nil && !errors.Is(err, ErrClosed) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !fromPeer(err)
}

// fromPeer says that the other side sent an alert.
func fromPeer(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

func alertText(err error) string {
	var op *net.OpError
	if errors.As(err, &op) && op.Err != nil {
		return op.Err.Error()
	}
	return err.Error()
}
