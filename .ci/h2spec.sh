#!/bin/sh
# Runs h2spec against the connections of codec and against the server on its socket: every case must pass. h2spec
# is built here; only Go is needed. Usage: .ci/h2spec.sh (from anywhere)
set -eu

H2SPEC_VERSION=v2.2.1+incompatible
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/.tmp/bin
mkdir -p "$bin"
GO=${GO:-go}

# h2spec has no go.mod: a scratch module builds it, with the versions of what it uses written down here.
h2spec=$bin/h2spec-$H2SPEC_VERSION
if [ ! -x "$h2spec" ]; then
	scratch=$root/.tmp/h2spec-module
	rm -rf "$scratch" && mkdir -p "$scratch"
	cat >"$scratch/go.mod" <<-MOD
		module scratch

		go 1.26.0

		require (
			github.com/fatih/color v1.19.0
			github.com/inconshreveable/mousetrap v1.1.0
			github.com/mattn/go-colorable v0.1.14
			github.com/mattn/go-isatty v0.0.20
			github.com/spf13/cobra v1.10.2
			github.com/spf13/pflag v1.0.9
			github.com/summerwind/h2spec $H2SPEC_VERSION
			golang.org/x/net v0.62.0
			golang.org/x/sys v0.49.0
			golang.org/x/text v0.43.0
		)
	MOD
	(cd "$scratch" && $GO build -mod=mod -o "$h2spec" github.com/summerwind/h2spec/cmd/h2spec)
fi
cd "$root"
out=$root/.tmp/h2spec.log
status=0
H2SPEC=$h2spec $GO test -count 1 -run 'TestH2Spec$' -v ./codec ./server >"$out" 2>&1 || status=$?
if [ "$status" -ne 0 ]; then
	cat "$out"
	exit "$status"
fi
sed -n 's/.*h2spec_test.go:[0-9]*: //p' "$out"
