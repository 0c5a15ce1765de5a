#!/bin/sh
# Runs the real etcdctl against a running spindle and compares what it prints with what etcd would.
# Everything is built here; only Go is needed. Usage: [ETCD_VERSION=v3.6.16] .ci/etcdctl.sh (from anywhere)
set -eu

ETCD_VERSION=${ETCD_VERSION:-v3.7.3}
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/.tmp/bin
mkdir -p "$bin"

# `go install package@version` refuses modules with replace directives, which etcdctl has: a scratch
# module builds it.
etcdctl=$bin/etcdctl-$ETCD_VERSION
if [ ! -x "$etcdctl" ]; then
	scratch=$root/.tmp/etcdctl-module
	rm -rf "$scratch" && mkdir -p "$scratch"
	cat >"$scratch/go.mod" <<-MOD
		module scratch

		go 1.26.0

		require go.etcd.io/etcd/etcdctl/v3 $ETCD_VERSION
	MOD
	(cd "$scratch" && go build -mod=mod -o "$etcdctl" go.etcd.io/etcd/etcdctl/v3)
fi
(cd "$root" && go build -o "$bin/spindle" .)

work=$(mktemp -d)
pid=
cleanup() {
	status=$?
	if [ -n "$pid" ]; then
		kill "$pid" 2>/dev/null || true
		wait "$pid" 2>/dev/null || true
	fi
	[ "$status" -eq 0 ] || { echo "--- spindle's log"; cat "$work/log"; }
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
endpoint=$(sed -n 's/.*Spindle is ready.* client=http:\/\/\([^ ]*\).*/\1/p' "$work/log")

export ETCDCTL_DIAL_TIMEOUT=20s
unset ETCDCTL_ENDPOINTS
ctl() { "$etcdctl" --endpoints "$endpoint" --command-timeout 20s "$@"; }
# In the background: `exec` makes $! the process itself, which a signal then reaches.
bg() { exec "$etcdctl" --endpoints "$endpoint" --command-timeout 20s "$@"; }

checks=0
# expect NAME WANTED GOT
expect() {
	checks=$((checks + 1))
	if [ "$2" != "$3" ]; then
		printf 'FAIL: %s\n--- wanted\n%s\n--- got\n%s\n' "$1" "$2" "$3"
		exit 1
	fi
}
# contains NAME PART TEXT
contains() {
	checks=$((checks + 1))
	case $3 in
	*"$2"*) ;;
	*)
		printf 'FAIL: %s\n--- should contain\n%s\n--- got\n%s\n' "$1" "$2" "$3"
		exit 1
		;;
	esac
}
# rev KEY: the mod revision of a key
rev() { ctl get "$1" -w json | sed -n 's/.*"mod_revision":\([0-9]*\).*/\1/p'; }

expect 'put' 'OK' "$(ctl put greeting hello)"
expect 'get' "greeting
hello" "$(ctl get greeting)"
expect 'get of a missing key' '' "$(ctl get nothing)"
r1=$(rev greeting)
expect 'put again' 'OK' "$(ctl put greeting hi)"
expect 'put --prev-kv' "OK
greeting
hi" "$(ctl put greeting hey --prev-kv)"
expect 'get --rev' "greeting
hello" "$(ctl get greeting --rev "$r1")"
contains 'version' '"version":3' "$(ctl get greeting -w json)"
contains 'create revision' "\"create_revision\":$r1," "$(ctl get greeting -w json)"

for i in 1 2 3 4 5 6 7 8 9; do ctl put "fruit/$i" "v$i" >/dev/null; done
expect 'get --prefix' 'fruit/1 v1 fruit/2 v2 fruit/3 v3 fruit/4 v4 fruit/5 v5 fruit/6 v6 fruit/7 v7 fruit/8 v8 fruit/9 v9' \
	"$(ctl get --prefix fruit/ | tr '\n' ' ' | sed 's/ $//')"
expect 'get --prefix --limit' 'fruit/1 fruit/2 fruit/3' "$(ctl get --prefix fruit/ --limit 3 --keys-only | tr -s '\n' ' ' | sed 's/ $//')"
contains 'more and count' '"more":true,"count":9' "$(ctl get --prefix fruit/ --limit 3 -w json)"
contains 'count only' '"Count" : 9' "$(ctl get --prefix fruit/ --count-only -w fields)"
expect 'get of a range' 'fruit/3 v3 fruit/4 v4' "$(ctl get fruit/3 fruit/5 | tr '\n' ' ' | sed 's/ $//')"
expect 'get --from-key' 'fruit/9 greeting' "$(ctl get --from-key fruit/9 --keys-only | tr -s '\n' ' ' | sed 's/ $//')"
expect 'all keys' '10' "$(ctl get --from-key '' --keys-only | grep -c .)"
expect 'descending' 'fruit/9 fruit/8' "$(ctl get --prefix fruit/ --order DESCEND --sort-by KEY --limit 2 --keys-only | tr -s '\n' ' ' | sed 's/ $//')"
expect 'serializable' "greeting
hey" "$(ctl get greeting --consistency s)"

expect 'txn, success' "SUCCESS

OK

greeting
from txn" "$(printf 'mod("greeting") > "0"\nvalue("greeting") = "hey"\n\nput greeting "from txn"\nget greeting\n\nput greeting lost\n\n' | ctl txn)"
expect 'txn, failure' "FAILURE

greeting
from txn" "$(printf 'version("greeting") = "1"\n\nput greeting no\n\nget greeting\n\n' | ctl txn)"
out=$(printf '\n\nput fruit/1 x\nput fruit/2 x\nput fruit/3 x\nput fruit/4 x\nput fruit/5 x\nput fruit/6 x\nput fruit/7 x\nput fruit/8 x\n\n\n' | ctl txn 2>&1) && {
	echo "FAIL: a txn over several shards was accepted: $out"
	exit 1
}
contains 'txn over several shards' 'shard' "$out"

# A watch of the past and of what comes.
start=$(rev fruit/1)
bg watch --prefix fruit/ --rev "$start" >"$work/watch" 2>&1 &
watch=$!
ctl put fruit/new fresh >/dev/null
expect 'del' '1' "$(ctl del fruit/new)"
tries=0
until grep -q DELETE "$work/watch"; do
	tries=$((tries + 1))
	if [ $tries -gt 200 ]; then
		echo "FAIL: watch brought only:"
		cat "$work/watch"
		exit 1
	fi
	sleep 0.1
done
kill "$watch"
wait "$watch" 2>/dev/null || true
expect 'watch' 'PUT fruit/1 v1 PUT fruit/2 v2 PUT fruit/3 v3 PUT fruit/4 v4 PUT fruit/5 v5 PUT fruit/6 v6 PUT fruit/7 v7 PUT fruit/8 v8 PUT fruit/9 v9 PUT fruit/new fresh DELETE fruit/new' \
	"$(tr '\n' ' ' <"$work/watch" | sed 's/ *$//')"

expect 'del of nothing' '0' "$(ctl del nothing)"
expect 'del --prefix' '9' "$(ctl del --prefix fruit/)"
expect 'get after del' '' "$(ctl get --prefix fruit/)"

# Leases. What is on one goes with it, on every shard.
lease=$(ctl lease grant 600 | sed -n 's/^lease \([0-9a-f]*\) granted with TTL(600s)$/\1/p')
[ -n "$lease" ] || { echo "FAIL: lease grant"; exit 1; }
for i in 1 2 3 4 5 6; do ctl put --lease="$lease" "leased/$i" x >/dev/null; done
expect 'lease list' "found 1 leases
$lease" "$(ctl lease list)"
contains 'lease timetolive' "lease $lease granted with TTL(600s), remaining(" "$(ctl lease timetolive "$lease")"
contains 'lease timetolive --keys' 'attached keys([leased/1 leased/2 leased/3 leased/4 leased/5 leased/6])' "$(ctl lease timetolive "$lease" --keys | tr ' ' '\n' | tr '\n' ' ')"
expect 'lease keep-alive --once' "lease $lease keepalived with TTL(600)" "$(ctl lease keep-alive --once "$lease")"
contains 'the lease of a key' "\"lease\":$(printf '%d' "0x$lease")" "$(ctl get leased/1 -w json)"
expect 'detach' 'OK' "$(ctl put leased/6 stays)"
expect 'lease revoke' "lease $lease revoked" "$(ctl lease revoke "$lease")"
expect 'keys of a revoked lease' 'leased/6' "$(ctl get --prefix leased/ --keys-only | tr -s '\n' ' ' | sed 's/ $//')"
out=$(ctl lease revoke "$lease" 2>&1) && {
	echo "FAIL: a lease was revoked twice: $out"
	exit 1
}
contains 'lease revoke, again' 'requested lease not found' "$out"
expect 'lease timetolive of none' "lease $lease already expired" "$(ctl lease timetolive "$lease")"
out=$(ctl put --lease="$lease" leased/7 x 2>&1) && {
	echo "FAIL: a put with a revoked lease: $out"
	exit 1
}
contains 'put with a revoked lease' 'requested lease not found' "$out"

# A lease that nobody keeps ends by itself. It has time to get its key on a busy machine, and is looked for later.
short=$(ctl lease grant 5 | sed -n 's/^lease \([0-9a-f]*\) .*/\1/p')
ctl put --lease="$short" leased/short x >/dev/null

# lock runs a command under a lock, one after the other; elect -l shows who leads.
expect 'lock' 'locked' "$(ctl lock mutex echo locked)"
bg lock mutex >"$work/lock" 2>&1 &
holder=$!
tries=0
until grep -q '^mutex/' "$work/lock"; do
	tries=$((tries + 1))
	[ $tries -le 200 ] || { echo "FAIL: lock: $(cat "$work/lock")"; exit 1; }
	sleep 0.1
done
bg lock mutex echo second >"$work/second" 2>&1 &
second=$!
tries=0
until [ "$(ctl get --prefix mutex/ --keys-only | grep -c .)" = 2 ]; do
	tries=$((tries + 1))
	[ $tries -le 200 ] || { echo "FAIL: nobody waits for the lock"; exit 1; }
	sleep 0.1
done
expect 'a lock that is taken' '' "$(cat "$work/second")"
kill "$holder"
wait "$holder" 2>/dev/null || true
wait "$second"
expect 'the next holder' 'second' "$(cat "$work/second")"

bg elect election me >"$work/elect" 2>&1 &
leader=$!
tries=0
until grep -q '^me$' "$work/elect"; do
	tries=$((tries + 1))
	[ $tries -le 200 ] || { echo "FAIL: elect: $(cat "$work/elect")"; exit 1; }
	sleep 0.1
done
bg elect -l election >"$work/observe" 2>&1 &
observer=$!
tries=0
until grep -q '^me$' "$work/observe"; do
	tries=$((tries + 1))
	[ $tries -le 200 ] || { echo "FAIL: elect -l: $(cat "$work/observe")"; exit 1; }
	sleep 0.1
done
kill "$leader" "$observer"
wait "$leader" 2>/dev/null || true
wait "$observer" 2>/dev/null || true
checks=$((checks + 2))
tries=0
while [ -n "$(ctl get leased/short)" ]; do
	tries=$((tries + 1))
	[ $tries -le 200 ] || { echo "FAIL: a lease of five seconds does not end"; exit 1; }
	sleep 0.1
done
checks=$((checks + 1))
expect 'nothing is left of locks and elections' '' "$(ctl get --prefix mutex/; ctl get --prefix election/)"

now=$(rev greeting)
contains 'compaction' "compacted revision $now" "$(ctl compaction "$now")"
out=$(ctl get greeting --rev "$r1" 2>&1) && {
	echo "FAIL: a compacted revision was read: $out"
	exit 1
}
contains 'get of a compacted revision' 'required revision has been compacted' "$out"
out=$(ctl get greeting --rev 1000000 2>&1) && {
	echo "FAIL: a future revision was read: $out"
	exit 1
}
contains 'get of a future revision' 'required revision is a future revision' "$out"
expect 'get after the compaction' "greeting
from txn" "$(ctl get greeting)"

contains 'endpoint status' "$endpoint" "$(ctl endpoint status)"
contains 'endpoint status, version' '"version":"3.' "$(ctl endpoint status -w json)"
contains 'endpoint health' 'is healthy' "$(ctl endpoint health 2>&1)"
contains 'endpoint health --cluster' 'is healthy' "$(ctl endpoint health --cluster 2>&1)"
contains 'member list' "http://$endpoint" "$(ctl member list)"
expect 'one member' '1' "$(ctl member list | grep -c started)"
expect 'alarm list' '' "$(ctl alarm list)"

kill -INT "$pid"
status=0
wait "$pid" || status=$?
pid=
expect 'exit code after SIGINT' '0' "$status"
echo "etcdctl $ETCD_VERSION: $checks checks passed"
