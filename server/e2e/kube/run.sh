#!/bin/sh
# Runs the tests of k8s.io/apiserver's etcd storage and of the cache above it, unchanged, against Spindle
# (SPINDLE_KUBE_BACKEND=spindle, the default) or a plain etcd (=etcd). RUN=pattern chooses tests, SKIP=no
# runs those of skip.txt too.
#
# The apiserver module is copied, because one package of the copy is replaced: the one that starts etcd.
# The tests mostly wait, so several processes share them.
set -eu
cd "$(dirname "$0")"
GO=${GO:-go}
JOBS=${JOBS:-4}
backend=${SPINDLE_KUBE_BACKEND:-spindle}
mkdir -p ../../../.tmp/kube
work=$(cd ../../../.tmp/kube && pwd)

$GO mod download k8s.io/apiserver
source=$($GO list -m -f '{{.Dir}}' k8s.io/apiserver)
copy=$work/$(basename "$source")
if [ ! -e "$copy/.complete" ]; then
	rm -rf "$copy"
	cp -R "$source" "$copy"
	chmod -R u+w "$copy"
	rm "$copy"/pkg/storage/etcd3/testserver/*.go
	: >"$copy/.complete"
fi
cp testserver/testserver.go "$copy/pkg/storage/etcd3/testserver/testserver.go"

# The module in use is this one, except that its go.mod points at the copy.
cp go.mod go.sum "$work"
$GO mod edit -replace "k8s.io/apiserver=$copy" "$work/go.mod"

# skips PACKAGE: one pattern of what is skipped there
skips() {
	[ "$backend" = etcd ] || [ "${SKIP:-}" = no ] || awk -v pkg="$1" '$1 == pkg || $1 == "*" { printf "%s%s", sep, $2; sep = "|" }' skip.txt
}

run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
pids=
for pkg in etcd3 cacher; do
	$GO test -modfile="$work/go.mod" -mod=mod -c -o "$work/$pkg.test" "k8s.io/apiserver/pkg/storage/$pkg"
	dir=$copy/pkg/storage/$pkg
	(cd "$dir" && "$work/$pkg.test" -test.list "${RUN:-.}") | grep '^Test' |
		awk -v jobs="$JOBS" -v out="$run/$pkg" '{ f = out "-" NR % jobs; printf "%s%s", (f in seen ? "|" : ""), $0 >f; seen[f] }'
done
for list in "$run"/*-*; do
	[ -e "$list" ] || { echo "no test is called like that"; exit 1; }
	pkg=$(basename "${list%-*}")
	skip=$(skips "$pkg")
	(
		cd "$copy/pkg/storage/$pkg"
		status=0
		"$work/$pkg.test" -test.v -test.timeout 15m -test.run "^($(cat "$list"))\$" ${skip:+-test.skip "$skip"} >"$list.out" 2>&1 || status=$?
		echo "$status" >"$list.status"
	) &
	pids="$pids $!"
done
wait $pids

failed=0
for status in "$run"/*.status; do
	[ "$(cat "$status")" = 0 ] && continue
	failed=1
	# What failed, without the tests that passed.
	grep -v -e '^=== ' -e '--- PASS' "${status%.status}.out" | tail -n 300
done
count() { cat "$run"/*.out | grep -c -e "--- $1:" || true; }
echo "k8s.io/apiserver's storage tests over $backend: $(count PASS) passed, $(count FAIL) failed, $(count SKIP) skipped by themselves"
exit $failed
