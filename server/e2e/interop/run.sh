#!/bin/sh
# Runs real clients against a running spindle: clientv3 3.5, 3.6 and 3.7 (interop_test.go, once with each), a
# grpc-go client with small windows and with gzip (the same file), etcdctl 3.5 and 3.6 (.ci/etcdctl.sh has 3.7),
# and h2load where it is installed (Debian: nghttp2-client). Only Go is needed, and the module proxy once.
set -eu
cd "$(dirname "$0")"
GO=${GO:-go}
root=$(cd ../../.. && pwd)
bin=$root/.tmp/bin
mkdir -p "$bin"

(cd "$root" && $GO build -o "$bin/spindle" .)
for v in v35 v36 v37; do
	mod=$v.mod
	[ $v != v37 ] || mod=go.mod
	$GO vet -modfile=$mod .
	$GO test -modfile=$mod -c -o "$bin/interop-$v.test" .
done

work=$(mktemp -d)
pid=
cleanup() {
	status=$?
	if [ -n "$pid" ]; then
		kill "$pid" 2>/dev/null || true
		wait "$pid" 2>/dev/null || true
	fi
	[ "$status" -eq 0 ] || { echo "--- spindle's log"; tail -n 20 "$work/log" | cut -c1-300; }
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

"$bin/spindle" --data-dir "$work/data" --listen-client-urls http://127.0.0.1:0 --listen-metrics-urls= 2>"$work/log" &
pid=$!
tries=0
until grep -qs 'Spindle is ready' "$work/log"; do
	tries=$((tries + 1))
	if [ $tries -gt 600 ] || ! kill -0 "$pid" 2>/dev/null; then
		echo "FAIL: spindle did not start"
		exit 1
	fi
	sleep 0.1
done
SPINDLE_ENDPOINT=$(sed -n 's/.*Spindle is ready.* client=http:\/\/\([^ ]*\).*/\1/p' "$work/log")
export SPINDLE_ENDPOINT

failed=0
for v in v35 v36 v37; do
	# The compaction of one run would meet the watches of another: one after the other.
	if "$bin/interop-$v.test" -test.timeout 5m ${RUN:+-test.run "$RUN"} -test.v >"$work/out" 2>&1; then
		echo "clientv3 $v: $(grep -c -e '^--- PASS' "$work/out") tests passed, $(grep -c -e '^--- SKIP' "$work/out" || true) skipped"
	else
		failed=1
		echo "FAIL: clientv3 $v"
		grep -v -e '^=== ' -e '^--- PASS' -e '^{' "$work/out" | tail -n 100
	fi
done

if ! command -v h2load >/dev/null; then
	echo "h2load is not installed, skipped (Debian: apt-get install nghttp2-client)"
else
	# A Range of the key "a": gRPC's prefix, then protobuf.
	printf '\000\000\000\000\003\n\001a' >"$work/range"
	h2load -n 20000 -c 20 -m 50 -t 2 -d "$work/range" -H 'content-type: application/grpc' -H 'te: trailers' \
		"http://$SPINDLE_ENDPOINT/etcdserverpb.KV/Range" >"$work/out" 2>&1 || failed=1
	grep -E '^(finished in|requests:|status codes:)' "$work/out"
	if ! grep -q '20000 succeeded, 0 failed, 0 errored' "$work/out" || ! grep -q 'status codes: 20000 2xx' "$work/out"; then
		failed=1
		echo "FAIL: h2load"
		cat "$work/out"
	fi
fi

for v in v3.5.35 v3.6.16; do
	ETCD_VERSION=$v "$root/.ci/etcdctl.sh" || failed=1
done
exit $failed
