// Command spindle serves the etcd API in front of several etcd clusters. Its README says how to run it,
// docs/design.md how it works; --help lists the flags.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	cfg, err := parse(os.Args[1:], os.Environ())
	switch {
	case errors.Is(err, errHelp):
		printHelp(os.Stdout)
		return
	case errors.Is(err, errVersion):
		printVersion(os.Stdout)
		return
	case err != nil:
		fail(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// The second signal, if somebody is in a hurry, ends the process at once.
	context.AfterFunc(ctx, stop)
	var hup chan os.Signal
	if cfg.file != "" {
		hup = make(chan os.Signal, 1)
		signal.Notify(hup, syscall.SIGHUP)
	}
	again := reloadable{file: cfg.file, load: func() (*Config, error) { return parse(os.Args[1:], os.Environ()) }}
	if err := run(ctx, cfg, hup, again, os.Stderr); err != nil {
		fail(err)
	}
}

// fail ends the process with one line that says what is wrong and what to do.
func fail(err error) {
	fmt.Fprintln(os.Stderr, "spindle:", err)
	os.Exit(1)
}
