package e2e

import (
	"bytes"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// A client that has a password works where authentication is not enabled, as with etcd.
func TestClientWithPassword(t *testing.T) {
	t.Parallel()
	etcd, spindle := startEtcd(t), startSpindle(t, 1, 1, nil)[0].ClientURLs()[0]
	for _, url := range []string{etcd, spindle} {
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, DialTimeout: readyTimeout, Username: "root", Password: "secret", Logger: zap.NewNop()})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Put(callContext(t), "k", "v"); err != nil {
			t.Fatal(err)
		}
	}
	a, b := dial(t, etcd), dial(t, spindle)
	req := &pb.AuthenticateRequest{Name: "root", Password: "secret"}
	_, want := pb.NewAuthClient(a.conn).Authenticate(callContext(t), req)
	_, got := pb.NewAuthClient(b.conn).Authenticate(callContext(t), req)
	if errText(want) != errText(got) {
		t.Errorf("Authenticate\netcd:    %v\nspindle: %v", want, got)
	}
	const status = "/etcdserverpb.Auth/AuthStatus"
	x, want := a.invoke(callContext(t), status, nil)
	y, got := b.invoke(callContext(t), status, nil)
	if want != nil || got != nil || !bytes.Equal(withoutHeader(x), withoutHeader(y)) {
		t.Errorf("AuthStatus\netcd:    %x %v\nspindle: %x %v", x, want, y, got)
	}
}

// As etcd, Status always has a DowngradeInfo: clients need not look whether it is there.
func TestStatusHasDowngradeInfo(t *testing.T) {
	t.Parallel()
	spindle := dial(t, startSpindle(t, 1, 1, nil)[0].ClientURLs()[0])
	r, err := spindle.m.Status(callContext(t), &pb.StatusRequest{})
	if err != nil || r.DowngradeInfo == nil || r.DowngradeInfo.Enabled {
		t.Errorf("%v %v", r, err)
	}
}
