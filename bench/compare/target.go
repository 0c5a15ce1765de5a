package compare

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"spindle/bench/client"
	"spindle/bench/load"
	"spindle/codec"
)

// Names of targets: Direct is one etcd, Proxied the same behind etcd grpc-proxy, "spindle-N" a Spindle over N
// shards and a coordinator, TwoStep a member and a coordinator without Spindle (load.TwoStep). Every etcd, proxy and Spindle is a process of its own. A name that ends in TLSSuffix has
// mutual TLS towards clients.
const (
	Direct        = "direct"
	Proxied       = "grpc-proxy"
	TwoStep       = "two-etcds"
	SpindlePrefix = "spindle-"
	TLSSuffix     = "+tls"
)

const (
	maxShards    = 16
	readyTimeout = 60 * time.Second
)

// What every etcd is started with; a Spindle's members need it (README, Members), and one etcd loses nothing by it.
const (
	maxTxnOps       = "1024"
	maxRequestBytes = "1638400"
	quotaBytes      = "8589934592"
)

// CheckTarget says what is wrong with the name of a target.
func CheckTarget(name string) error {
	base := strings.TrimSuffix(name, TLSSuffix)
	if base == Direct || base == Proxied || name == TwoStep {
		return nil
	}
	if _, err := shardsOf(base); err != nil {
		return fmt.Errorf("there is no target %q: take %s, %s or %sN (N from 1 to %d), each with or without %s", name, Direct, Proxied, SpindlePrefix, maxShards, TLSSuffix)
	}
	return nil
}

func shardsOf(base string) (int, error) {
	v, ok := strings.CutPrefix(base, SpindlePrefix)
	n, err := strconv.Atoi(v)
	if !ok || err != nil || n < 1 || n > maxShards {
		return 0, errors.New("not a Spindle")
	}
	return n, nil
}

// target is a running endpoint with all the processes behind it.
type target struct {
	name     string
	endpoint string
	coord    string // TwoStep: the coordinator
	tls      *tls.Config
	procs    []*process
}

func (t *target) processes() (all []load.Process) {
	for _, p := range t.procs {
		all = append(all, load.Process{Name: p.name, PID: p.cmd.Process.Pid})
	}
	return all
}

func (t *target) stop() {
	for i := len(t.procs) - 1; i >= 0; i-- {
		t.procs[i].stop()
	}
}

// ended returns why a process of t has ended, nil if none has.
func (t *target) ended() error {
	for _, p := range t.procs {
		select {
		case <-p.done:
			return p.failure()
		default:
		}
	}
	return nil
}

// last is what the process that clients talk to said last, nil if nothing.
func (t *target) last() error {
	if front := t.procs[len(t.procs)-1]; len(front.said()) > 0 {
		return fmt.Errorf("the log of %s ends with\n%s", front.name, front.said())
	}
	return nil
}

// up starts a target. data gives the directory for the data of an etcd that holds keys: "" for the usual one.
func (e *Env) up(ctx context.Context, name string, data func() (string, error)) (_ *target, err error) {
	base, secure := strings.CutSuffix(name, TLSSuffix)
	dir, err := os.MkdirTemp(e.dir, base+"-")
	if err != nil {
		return nil, err
	}
	t := &target{name: name}
	defer func() {
		if err != nil {
			t.stop()
		}
	}()
	addr, err := freePort()
	if err != nil {
		return nil, err
	}
	scheme := "http://"
	var c *certs
	if secure {
		if c, err = newCerts(dir); err != nil {
			return nil, err
		}
		scheme, t.tls = "https://", c.client
	}
	t.endpoint = scheme + addr

	if base == Direct {
		if err := e.etcd(t, "etcd", dir, data, t.endpoint, c); err != nil {
			return nil, err
		}
		return t, t.await(ctx)
	}
	if base == TwoStep {
		at, err := freePort()
		if err != nil {
			return nil, err
		}
		t.coord = "http://" + at
		if err := e.etcd(t, "shard-1", dir, data, t.endpoint, nil); err != nil {
			return nil, err
		}
		if err := e.etcd(t, "coordinator", dir, nil, t.coord, nil); err != nil {
			return nil, err
		}
		if err := t.awaitAt(ctx, t.coord); err != nil {
			return nil, err
		}
		return t, t.await(ctx)
	}
	if base == Proxied {
		behind, err := freePort()
		if err != nil {
			return nil, err
		}
		if err := e.etcd(t, "etcd", dir, data, "http://"+behind, nil); err != nil {
			return nil, err
		}
		args := []string{"etcd", "grpc-proxy", "start", "--endpoints", "http://" + behind, "--listen-addr", addr,
			"--advertise-client-url", addr, "--data-dir", filepath.Join(dir, "proxy")}
		if c != nil {
			args = append(args, "--cert-file", c.cert, "--key-file", c.key, "--trusted-ca-file", c.ca,
				"--cacert", c.ca, "--cert", c.cert, "--key", c.key)
		}
		p, err := startProcess(Proxied, dir, e.self, args...)
		if err != nil {
			return nil, err
		}
		t.procs = append(t.procs, p)
		return t, t.await(ctx)
	}

	n, err := shardsOf(base)
	if err != nil {
		return nil, err
	}
	web := ""
	if e.cfg.Profile != "" {
		at, err := freePort()
		if err != nil {
			return nil, err
		}
		web = "http://" + at
	}
	args := []string{"--listen-client-urls", t.endpoint, "--listen-metrics-urls=" + web, "--enable-pprof=" + strconv.FormatBool(web != ""),
		"--shard-max-txn-ops", maxTxnOps, "--shard-max-request-bytes", maxRequestBytes}
	if c != nil {
		args = append(args, "--cert-file", c.cert, "--key-file", c.key, "--trusted-ca-file", c.ca, "--client-cert-auth=true")
	}
	args = append(args, e.cfg.SpindleArgs...)
	for i := range n + 1 {
		at, err := freePort()
		if err != nil {
			return nil, err
		}
		name, where := "shard-"+strconv.Itoa(i+1), data
		if i == n {
			name, where = "coordinator", nil
			args = append(args, "--coordinator", "http://"+at)
		} else {
			args = append(args, "--shard", name+"=http://"+at)
		}
		if err := e.etcd(t, name, dir, where, "http://"+at, nil); err != nil {
			return nil, err
		}
	}
	binary, err := e.spindle()
	if err != nil {
		return nil, err
	}
	p, err := startProcess("spindle", dir, binary, args...)
	if err != nil {
		return nil, err
	}
	p.web = web
	t.procs = append(t.procs, p)
	return t, t.await(ctx)
}

// etcd starts one for t; c is nil without TLS.
func (e *Env) etcd(t *target, name, dir string, data func() (string, error), endpoint string, c *certs) error {
	peer, err := freePort()
	if err != nil {
		return err
	}
	where := dir
	if data != nil {
		if where, err = data(); err != nil {
			return err
		}
	}
	args := []string{"etcd", "--name", name, "--data-dir", filepath.Join(where, name), "--log-level", "error",
		"--listen-client-urls", endpoint, "--advertise-client-urls", endpoint,
		"--listen-peer-urls", "http://" + peer, "--initial-advertise-peer-urls", "http://" + peer,
		"--initial-cluster", name + "=http://" + peer, "--initial-cluster-token", peer,
		"--max-txn-ops", maxTxnOps, "--max-request-bytes", maxRequestBytes, "--quota-backend-bytes", quotaBytes}
	if c != nil {
		args = append(args, "--cert-file", c.cert, "--key-file", c.key, "--trusted-ca-file", c.ca, "--client-cert-auth")
	}
	web := ""
	if e.cfg.Profile != "" && c == nil { // on the client URL; another one would change how that is served
		web = endpoint
		args = append(args, "--enable-pprof")
	}
	p, err := startProcess(name, dir, e.self, args...)
	if err != nil {
		return err
	}
	p.web = web
	t.procs = append(t.procs, p)
	return nil
}

// await returns when the target answers a linearizable read.
func (t *target) await(ctx context.Context) error { return t.awaitAt(ctx, t.endpoint) }

func (t *target) awaitAt(ctx context.Context, endpoint string) error {
	addr := endpoint[strings.Index(endpoint, "//")+2:]
	return await(ctx, t.name, readyTimeout, t.procs, func() error {
		c, err := client.Dial(ctx, addr, t.tls, "")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Do("/etcdserverpb.KV/Range", codec.AppendString(nil, 1, "/bench/ready"))
		return err
	})
}
