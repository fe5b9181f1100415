# Every target needs only Go, and says what else it uses. 'make help' lists them.

GO          ?= go
# A number of executions: with a duration, go test now and then reports its own deadline as a failure.
FUZZTIME    ?= 60000x
BENCH       ?= .
STATICCHECK := $(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOLANGCI    := $(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
PLATFORMS   := linux/amd64 linux/arm64 windows/amd64 darwin/arm64
DTYPES      := raw f32 f16 bf16
DEVICE      ?= auto
BIN         := bin/gguf2gpu

.DEFAULT_GOAL := help
.PHONY: build test race lint golangci fuzz bench cross generate generated qemu gpu-kernels e2e hipsim rig smoke check clean help

build: ## build the command into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN) ./cmd/gguf2gpu

test: ## run the tests
	$(GO) test ./...

race: ## run the tests with the race detector (needs a C compiler)
	CGO_ENABLED=1 $(GO) test -race ./...

lint: ## gofmt, go vet for every kind of build, staticcheck
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "gofmt: $$unformatted"; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags purego ./...
	GOARCH=arm64 $(GO) vet ./...
	GOOS=windows $(GO) vet ./...
	GOOS=darwin GOARCH=arm64 $(GO) vet ./...
	$(STATICCHECK) ./...
	$(GO) -C kernels/_asm vet ./...

golangci: ## golangci-lint; slow to build, so not part of lint
	$(GOLANGCI) run ./...

fuzz: ## fuzz every fuzz target for FUZZTIME
	@for pkg in $$($(GO) list ./...); do \
		for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
			echo "fuzz $$pkg $$target for $(FUZZTIME)"; \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x $$pkg || exit 1; \
		done; \
	done

bench: ## run the benchmarks that match BENCH
	$(GO) test -run '^$$' -bench '$(BENCH)' ./...

cross: ## build for every platform, without cgo
	@for p in $(PLATFORMS); do \
		echo "build $$p"; \
		CGO_ENABLED=0 GOOS=$${p%/*} GOARCH=$${p#*/} $(GO) build ./... || exit 1; \
	done

generate: ## regenerate generated code: the assembly kernels
	$(GO) -C kernels/_asm run . -dir ..

generated: ## fail when regenerating changes anything
	@state() { git ls-files -z -co --exclude-standard | xargs -0 cksum | cksum; }; before=$$(state); \
	$(MAKE) --no-print-directory generate && test "$$before" = "$$(state)" || { git status --short; exit 1; }

qemu: ## run the kernels on an emulated CPU without AVX-512 (needs qemu-user)
	@if command -v qemu-x86_64 >/dev/null; then \
		CGO_ENABLED=0 GOARCH=amd64 KERNELS_REQUIRE=avx2 $(GO) test -short -exec 'qemu-x86_64 -cpu Haswell' ./kernels; \
	else \
		echo 'qemu: skipped, there is no qemu-x86_64 (package qemu-user)'; \
	fi

gpu-kernels: ## compile the GPU kernels with AMD's compilers that are there, and show what they take of a GPU
	$(GO) test -count 1 -v -run 'TestAMDCompiles|TestClangCompiles' ./kernels/gpu

e2e: build ## inspect MODEL=path, load it in every dtype, verify each; DEVICE=soft or hip to choose
	@test -n '$(MODEL)' || { echo 'usage: make e2e MODEL=path [DEVICE=auto|soft|hip]'; exit 2; }
	$(BIN) inspect '$(MODEL)' >/dev/null
	@for d in $(DTYPES); do \
		echo "load and verify $(MODEL) as $$d on $(DEVICE)"; \
		$(BIN) load '$(MODEL)' --device $(DEVICE) --dtype $$d --progress none || exit 1; \
		$(BIN) verify '$(MODEL)' --device $(DEVICE) --dtype $$d --progress none || exit 1; \
	done

hipsim: bin/libamdhip64.so ## build the simulator of AMD's library (needs a C compiler)

bin/libamdhip64.so: testdata/hipsim/hipsim.c testdata/hipsim/hiprtc.c
	mkdir -p bin
	$${CC:-cc} -std=c11 -O1 -g -Wall -fPIC -shared -o $@ $^ -lpthread

rig: bin/rig/libamdhip64.so ## build the HIP library over NVIDIA's driver (needs a C compiler; see testdata/rigs)

bin/rig/libamdhip64.so: testdata/rigs/hip-on-cuda/hipcuda.c
	mkdir -p bin/rig
	$${CC:-cc} -O2 -Wall -fPIC -shared -o $@ $< -ldl -lpthread

smoke: build hipsim ## load the sample model on the software device and through the simulator
	$(MAKE) e2e MODEL=testdata/tiny-llama.gguf DEVICE=soft
	GGUF2GPU_HIP_LIBRARY=$(CURDIR)/bin/libamdhip64.so $(MAKE) e2e MODEL=testdata/tiny-llama.gguf DEVICE=hip
	@if command -v c++ >/dev/null; then \
		set -x; GGUF2GPU_HIP_LIBRARY=$(CURDIR)/bin/libamdhip64.so \
		$(BIN) verify testdata/tiny-llama.gguf --device hip --dequant gpu --kernel-cache off --progress none; \
	else \
		echo 'smoke: no kernels through the simulator, there is no c++'; \
	fi

check: ## all that CI runs, with what this machine has
	.ci/run --no-install

clean: ## remove what was built
	rm -rf bin
	$(GO) clean ./...

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
