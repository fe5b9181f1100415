# Every target needs only Go, and says what else it uses. 'make help' lists them.

GO          ?= go
# A number of executions: with a duration, go test now and then reports its own deadline as a failure.
FUZZTIME    ?= 60000x
# The same for FuzzCombinations, which runs whole commands.
COMBINATIONS ?= 2000x
BENCH       ?= .
HOURS       ?= 1
# The CPUs that 'make qemu' emulates, each with the kernel tier that it must be seen to have.
QEMU_CPUS   ?= Haswell:avx2 Nehalem:generic
STATICCHECK := $(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOLANGCI    := $(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
ACTIONLINT  := $(GO) run github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
PLATFORMS   := linux/amd64 linux/arm64 windows/amd64 darwin/arm64
DTYPES      := raw f32 f16 bf16
DEVICE      ?= auto
BIN         := bin/gguf2gpu

.DEFAULT_GOAL := help
.PHONY: build test race faults lint line-width workflows golangci fuzz bench cross 32bit generate generated qemu \
	gpu-kernels amd-runtimes e2e hipsim hipsim-test rig rig-test model-rig model-test python peers soak smoke dist \
	dist-check check clean help

build: ## build the command into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN) ./cmd/gguf2gpu

test: ## run the tests
	$(GO) test -timeout 30m ./...

race: ## run the tests with the race detector, but for those of AMD's compilers (needs a C compiler)
	CGO_ENABLED=1 $(GO) test -race -timeout 40m -skip '^Test(AMD|Clang)Compiles$$' ./...

faults: ## let every HIP call of loads, holding and attaching block or fail, with every second fault (an hour)
	GGUF2GPU_ALL_FAULTS=1 $(GO) test -count 1 -v -timeout 12h -run 'Block|EveryCall|FaultsOfTheLibrary|IPCFaults' \
		./loader ./loader/hold ./cmd/gguf2gpu

lint: line-width ## gofmt, line width, go vet for every kind of build, staticcheck
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "gofmt: $$unformatted"; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags purego ./...
	GOARCH=arm64 $(GO) vet ./...
	GOOS=windows $(GO) vet ./...
	GOOS=darwin GOARCH=arm64 $(GO) vet ./...
	$(STATICCHECK) ./...
	$(GO) -C kernels/_asm vet ./...

line-width: ## fail when a line is longer than 120 characters
	@.ci/line-width

workflows: ## check the workflows of GitHub Actions
	$(ACTIONLINT) -shellcheck= -pyflakes=

golangci: ## golangci-lint, which takes minutes to build, so that it is not part of lint but a job of its own
	$(GOLANGCI) run ./...

fuzz: ## fuzz every fuzz target for FUZZTIME, combinations of flags for COMBINATIONS
	@for pkg in $$($(GO) list ./...); do \
		for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
			case $$target in FuzzCombinations) time=$(COMBINATIONS);; *) time=$(FUZZTIME);; esac; \
			echo "fuzz $$pkg $$target for $$time"; \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $$time -fuzzminimizetime 20x $$pkg || exit 1; \
		done; \
	done

bench: ## run the benchmarks that match BENCH
	$(GO) test -run '^$$' -bench '$(BENCH)' ./...

cross: ## build for every platform, without cgo
	@for p in $(PLATFORMS); do \
		echo "build $$p"; \
		CGO_ENABLED=0 GOOS=$${p%/*} GOARCH=$${p#*/} $(GO) build ./... || exit 1; \
	done

32bit: ## fail unless building for a 32-bit CPU says that a 64-bit one is needed
	@for p in gguf amdhip; do \
		if said=$$(GOARCH=386 CGO_ENABLED=0 $(GO) vet ./$$p 2>&1); then \
			echo "32bit: package $$p builds for 386, where it cannot work"; exit 1; \
		elif ! echo "$$said" | grep -qi '64[-_ ]bit'; then \
			echo "$$said"; echo "32bit: for 386 the compiler does not say that package $$p needs a 64-bit CPU"; exit 1; \
		fi; \
		echo "32bit: $$p says that it needs a 64-bit CPU"; \
	done

generate: ## regenerate generated code: the assembly kernels
	$(GO) -C kernels/_asm run . -dir ..

generated: ## fail when regenerating changes anything
	@state() { git ls-files -z -co --exclude-standard | xargs -0 cksum | cksum; }; before=$$(state); \
	$(MAKE) --no-print-directory generate && test "$$before" = "$$(state)" || { git status --short; exit 1; }

qemu: ## run the kernels on emulated CPUs: one with AVX2 alone, one with neither AVX2 nor AVX-512 (needs qemu-user)
	@if ! command -v qemu-x86_64 >/dev/null; then \
		echo 'qemu: skipped, there is no qemu-x86_64 (package qemu-user)'; exit 0; \
	fi; \
	for cpu in $(QEMU_CPUS); do \
		echo "kernels on $${cpu%:*}, which must have the tier $${cpu#*:}"; \
		CGO_ENABLED=0 GOARCH=amd64 KERNELS_REQUIRE=$${cpu#*:} \
			$(GO) test -short -exec "qemu-x86_64 -cpu $${cpu%:*}" ./kernels || exit 1; \
	done

gpu-kernels: ## compile the GPU kernels with AMD's compilers that are there, and show what they take of a GPU
	$(GO) test -count 1 -v -run 'TestAMDCompiles|TestClangCompiles' ./kernels/gpu

amd-runtimes: ## test with AMD's runtimes 5.7, 6.4 and 7.2, from Debian's newer suites (RUNTIMESFLAGS=--no-install)
	@GO='$(GO)' .ci/amd-runtimes $(RUNTIMESFLAGS)

e2e: build ## inspect MODEL=path, load it in every dtype, verify each; DEVICE=soft or hip to choose
	@test -n '$(MODEL)' || { echo 'usage: make e2e MODEL=path [DEVICE=auto|soft|hip]'; exit 2; }
	$(BIN) inspect '$(MODEL)' >/dev/null
	@for d in $(DTYPES); do \
		echo "load and verify $(MODEL) as $$d on $(DEVICE)"; \
		$(BIN) load '$(MODEL)' --device $(DEVICE) --dtype $$d --progress none || exit 1; \
		$(BIN) verify '$(MODEL)' --device $(DEVICE) --dtype $$d --progress none || exit 1; \
	done

hipsim: bin/libamdhip64.so ## build the simulator of AMD's library (needs a C compiler)

bin/libamdhip64.so: testdata/hipsim/hipsim.c testdata/hipsim/hiprtc.c $(wildcard testdata/hipsim/parts/*.c)
	mkdir -p bin
	$${CC:-cc} -std=c11 -O1 -g -Wall -fPIC -shared -o $@ testdata/hipsim/hipsim.c testdata/hipsim/hiprtc.c -lpthread

hipsim-test: hipsim bin/selftest ## test the simulator itself (needs C and C++ compilers)
	bin/selftest $(CURDIR)/bin/libamdhip64.so

bin/selftest: testdata/hipsim/selftest.c testdata/hipsim/selftest_strict.c
	mkdir -p bin
	$${CC:-cc} -std=c11 -O1 -g -Wall -o $@ $< -ldl -lpthread

rig: bin/rig/libamdhip64.so ## build the HIP library over NVIDIA's driver (needs a C compiler; see testdata/rigs)

bin/rig/libamdhip64.so: testdata/rigs/hip-on-cuda/hipcuda.c $(wildcard testdata/rigs/hip-on-cuda/parts/*.c)
	mkdir -p bin/rig
	$${CC:-cc} -O2 -Wall -fPIC -shared -o $@ $< -ldl -lpthread

rig-test: rig bin/selftest ## test the HIP library over NVIDIA's driver (needs an NVIDIA GPU and NVRTC)
	bin/selftest $(CURDIR)/bin/rig/libamdhip64.so

model-rig: bin/model/libhsamodel.so ## build the model of a GPU under AMD's runtime (needs a C compiler)

bin/model/libhsamodel.so: testdata/rigs/hsa-model/hsamodel.c $(wildcard testdata/rigs/hsa-model/parts/*)
	mkdir -p bin/model
	$${CC:-cc} -std=gnu11 -O1 -g -Wall -Wextra -fPIC -shared -o $@ $< -lpthread

model-test: model-rig ## load through AMD's HIP 7.2 and 6.4 on the model of a GPU (needs 'make amd-runtimes' before)
	@GO='$(GO)' testdata/rigs/hsa-model/test

python: build hipsim ## test the Python package (needs Python 3.9; PYTHONFLAGS=--no-install takes what it has)
	.ci/python $(PYTHONFLAGS)

soak: ## loads, tiers, attaching, kills, faults and flipped bits at random, for HOURS=1
	GGUF2GPU_SOAK=$(HOURS)h $(GO) test -count 1 -v -timeout 0 -run TestSoak ./cmd/gguf2gpu

peers: ## compare parser and kernels with gguf-py (needs Python 3.9; PEERFLAGS=--no-install takes what it has)
	GO='$(GO)' .ci/peers $(PEERFLAGS)

smoke: build hipsim ## load the sample model on the software device and through the simulator
	$(MAKE) e2e MODEL=testdata/tiny-llama.gguf DEVICE=soft
	GGUF2GPU_HIP_LIBRARY=$(CURDIR)/bin/libamdhip64.so $(MAKE) e2e MODEL=testdata/tiny-llama.gguf DEVICE=hip
	@if command -v c++ >/dev/null; then \
		set -x; GGUF2GPU_HIP_LIBRARY=$(CURDIR)/bin/libamdhip64.so \
		$(BIN) verify testdata/tiny-llama.gguf --device hip --dequant gpu --kernel-cache off --progress none; \
	else \
		echo 'smoke: no kernels through the simulator, there is no c++'; \
	fi

dist: ## archives, deb, rpm, container layer, SBOMs and checksums of the commit, in bin/dist; IMAGE_BASE=image@digest
	@GO='$(GO)' DIST_PLATFORMS='$(PLATFORMS)' IMAGE_BASE='$(IMAGE_BASE)' .ci/dist bin/dist

dist-check: ## fail unless two builds for linux/amd64, container image included, are the same, bit for bit, and work
	@GO='$(GO)' .ci/dist-check bin/dist-check

dist-test: ## try what 'make dist' has made: unpack it all, run the programs, verify units and manual pages
	.ci/dist-test bin/dist

check: ## all that CI runs, with what this machine has
	.ci/run --no-install

clean: ## remove what was built
	rm -rf bin
	$(GO) clean ./...

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
