package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"spindle/codec"
)

// unaryTimeout bounds Do.
const unaryTimeout = 10 * time.Second

// Do sends one request and waits for its answer. It is for what is asked once: it allocates. Not locked, and not from within a Sink.
func (c *Conn) Do(path string, msg []byte) ([]byte, error) {
	a := &answer{end: make(chan codec.Status, 1)}
	c.Lock()
	ok := c.Call(path, msg, a)
	c.Unlock()
	if !ok {
		return nil, errors.New("the connection takes no request")
	}
	timeout := time.NewTimer(unaryTimeout)
	defer timeout.Stop()
	select {
	case st := <-a.end:
		if st.Code != codec.OK {
			return nil, st
		}
		return a.msg, nil
	case <-timeout.C:
		return nil, errors.New("no answer")
	}
}

// answer is the Sink of Do.
type answer struct {
	msg []byte
	end chan codec.Status
}

// Message implements Sink.
func (a *answer) Message(m []byte) { a.msg = append([]byte(nil), m...) }

// End implements Sink.
func (a *answer) End(st codec.Status) { a.end <- st }

// authNotEnabled is etcd's rpctypes.ErrGRPCAuthNotEnabled.
const authNotEnabled = "etcdserver: authentication is not enabled"

// Authenticate asks the server at address for a user's token. As with etcd's own client, one that does not authenticate its users
// gives none, and that is no error.
func Authenticate(ctx context.Context, address string, cfg *tls.Config, name, password string) (token string, err error) {
	c, err := Dial(ctx, address, cfg, "")
	if err != nil {
		return "", err
	}
	defer c.Close()
	resp, err := c.Do("/etcdserverpb.Auth/Authenticate", codec.AppendString(codec.AppendString(nil, 1, name), 2, password))
	if st, ok := errors.AsType[codec.Status](err); ok && st.Msg == authNotEnabled {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("cannot authenticate as %q: %w", name, err)
	}
	it := codec.Fields{Msg: resp}
	for it.Next() {
		if it.Field.Num == 2 {
			token = string(it.Field.Bytes)
		}
	}
	if it.Bad || token == "" {
		return "", fmt.Errorf("cannot authenticate as %q: the answer holds no token", name)
	}
	return token, nil
}
