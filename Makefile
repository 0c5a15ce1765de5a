# Targets for people; .ci/run uses the same ones. Nothing but Go (and a POSIX shell) is needed.

GO ?= go
BIN := .tmp/bin

# Packages whose tests are worth their time under the race detector. server/e2e scales itself down there. It takes the longest, so it is named first: go test
# begins with it, and runs the others beside it.
RACE := ./server/e2e ./bench/... ./codec/... ./revclock/... ./server/... ./shard/... ./watchring/...

# How long each fuzz target runs, and how many seeds `make sim` takes.
FUZZTIME ?= 30s
SEEDS ?= 20000

# What a process of the fuzzer may map, in KiB: an input that takes more memory ends it, and is a finding.
FUZZMEM ?= 4194304

# How long `make soak` runs.
SOAK ?= 3m

# How long `make chaos` breaks things.
CHAOS ?= 5m

# How long each load of `make contention` lasts.
CONTENTION ?= 8s

# How long `make attack` runs each attack.
ATTACK ?= 3s

# What the tests of kube-apiserver's storage run over: spindle or etcd.
KUBE_BACKEND ?= spindle

.PHONY: help
help: ## Show this
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: ## Run Spindle over three embedded member clusters, data in ./spindle.data
	$(GO) run .

.PHONY: build
build: ## Build ./spindle
	$(GO) build -o spindle .

.PHONY: test
test: lint ## Everything: lint, all tests, the race detector, the real etcdctl
	$(GO) test -timeout 25m ./server/e2e ./...
	.ci/etcdctl.sh
	$(GO) test -race -short -timeout 25m $(RACE)

.PHONY: race
race: ## All tests under the race detector
	$(GO) test -race -timeout 30m $(RACE)

.PHONY: e2e
e2e: ## Only the black-box tests, with their numbers
	$(GO) test -count 1 -v -timeout 25m ./server/e2e

.PHONY: etcdctl
etcdctl: ## The real etcdctl against a running Spindle
	.ci/etcdctl.sh

.PHONY: h2spec
h2spec: ## h2spec against codec's connections and against the server
	GO='$(GO)' .ci/h2spec.sh

.PHONY: interop
interop: ## Real clients against a running Spindle: clientv3 and etcdctl 3.5 to 3.7, grpc-go with small windows, gzip, h2load
	GO='$(GO)' server/e2e/interop/run.sh

.PHONY: kube
kube: ## The tests of kube-apiserver's storage over Spindle (KUBE_BACKEND=etcd: over a plain etcd)
	cd server/e2e/kube && $(GO) vet ./... && SPINDLE_KUBE_BACKEND=$(KUBE_BACKEND) $(GO) test ./...
	SPINDLE_KUBE_BACKEND=$(KUBE_BACKEND) GO='$(GO)' server/e2e/kube/run.sh

.PHONY: soak
soak: ## Random load, compactions, watches and memory for SOAK=3m, compared with the history
	SPINDLE_SOAK=$(SOAK) $(GO) test -count 1 -v -timeout 24h -run 'TestSoak$$' ./server/e2e

.PHONY: chaos
chaos: ## Kill, stop and cut off real processes under a checked load for CHAOS=5m: what clients noticed of each fault
	SPINDLE_CHAOS=$(CHAOS) $(GO) test -count 1 -v -timeout 24h -run 'TestChaos$$' ./server/e2e/chaos

.PHONY: contention
contention: ## Several proxies that write against each other, a slow disk, a shard that returns: each load for CONTENTION=8s
	SPINDLE_CHAOS_MEASURE=$(CONTENTION) $(GO) test -count 1 -v -timeout 1h -run 'TestContention$$|TestSlowDisk$$|TestShardReturns$$' ./server/e2e/chaos

.PHONY: multinode
multinode: ## Nodes of a three-node member cluster fail in every way under a checked load: what clients saw
	SPINDLE_MULTINODE=1 $(GO) test -count 1 -v -timeout 1h -run 'TestNodesFail$$|TestShardSlowMuteDead$$' ./server/e2e

.PHONY: attack
attack: ## Every attack on the server for ATTACK=3s: what was sent, what the proxy spent, what a good client saw
	SPINDLE_ATTACK=$(ATTACK) $(GO) test -count 1 -v -timeout 1h -run 'TestAttackReport$$' ./server/e2e

.PHONY: sim
sim: ## The simulation of the protocol, SEEDS=20000 of each kind of run
	SPINDLE_SIM_SEEDS=$(SEEDS) $(GO) test -count 1 -v -timeout 24h -run '^Test(Simulation|Rebuild|Faults|ContendedSwaps|AcceptedLosses|Ahead|ForgottenMembers)$$' ./shard/sim

.PHONY: fuzz
fuzz: ## Every fuzz target for FUZZTIME=30s; a crash, a hang or more than FUZZMEM KiB fails
	@set -e; ulimit -v $(FUZZMEM); for dir in $$(grep -rl '^func Fuzz' --include='*_test.go' --exclude-dir=.tmp . | xargs -n1 dirname | sort -u); do \
		for f in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(f .*/\1/p' $$dir/*_test.go); do \
			echo "== $$dir $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x $$dir; \
		done; \
	done

.PHONY: bench
bench: ## The load tester: compare etcd, etcd grpc-proxy and Spindle on this machine (ARGS='--help')
	$(GO) run ./bench compare $(ARGS)

.PHONY: microbench
microbench: ## Micro-benchmarks of the packages
	$(GO) test -run '^$$' -bench . -benchmem ./codec/... ./revclock/... ./server ./shard ./watchring/...

.PHONY: lint
lint: ## gofmt and go vet
	@out=$$(gofmt -l *.go */); if [ -n "$$out" ]; then echo "not gofmt'ed:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...

.PHONY: clean
clean: ## Remove what was built (not ./spindle.data)
	rm -rf .tmp spindle
