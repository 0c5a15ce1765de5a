// Command bench is Spindle's load tester. It drives any etcd endpoint with the requests that Kubernetes makes, and
// `bench compare` sets up etcd, etcd grpc-proxy and Spindle on this machine and measures them side by side.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	args := os.Args[1:]
	if len(args) > 0 && args[0] == "etcd" {
		// What compare starts: etcd is this program again, so that nothing need be installed.
		os.Args = args
		etcdmain.Main(args)
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second one ends it at once
	var err error
	if len(args) > 0 && args[0] == "compare" {
		err = compareCommand(ctx, args[1:])
	} else {
		err = loadCommand(ctx, args)
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}
