package loader

import (
	"errors"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// planFor is a plan for n devices with the same memory.
func planFor(t *testing.T, m *gguf.File, o options, n int) *plan.Plan {
	t.Helper()
	free := make([]uint64, n)
	for i := range free {
		free[i] = 1 << 40
	}
	p, err := plan.New(m, o.spec(), free)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestSizesOfOne: what goes to one of several devices is loaded as if there was no other.
func TestSizesOfOne(t *testing.T) {
	t.Parallel()
	m := openModel(t, sparse(t, 16, 64<<20))
	for _, o := range []options{{}, {Threads: 8}, {Staging: 4 << 20, Chunk: 1 << 20}, {Connections: 5}} {
		for _, far := range []bool{false, true} {
			alone, err := sizesOf(planFor(t, m, o, 1), o.config(), far, nil)
			if err != nil {
				t.Fatal(err)
			}
			of := o
			of.Split = plan.Split{Ratio: []float64{0, 0, 1, 0}}
			all, err := sizesOf(planFor(t, m, of, 4), o.config(), far, nil)
			if err != nil || len(all) != 4 || all[2] != alone[0] {
				t.Errorf("%+v, remote %v: %+v, alone %+v, %v", o, far, all, alone, err)
			}
		}
	}
}

// TestSizes wants all sizes of a load to be usable, and no more than what was asked for.
func TestSizes(t *testing.T) {
	t.Parallel()
	m := openModel(t, sparse(t, 16, 64<<20)) // 2 GiB of F16
	for _, o := range []options{
		{},
		{Threads: 100},
		{Threads: 1},
		{Streams: 7},
		{Chunk: 1 << 28},
		{Staging: 1 << 20},
		{Staging: 4 << 20, Chunk: 64 << 10},
		{Staging: 3_000_000},
		{Connections: 5},
		{Split: plan.Split{By: plan.SplitNone}},
	} {
		for _, n := range []int{1, 2, 4} {
			for _, far := range []bool{false, true} {
				p := planFor(t, m, o, n)
				all, err := sizesOf(p, o.config(), far, nil)
				if err != nil || len(all) != len(p.Groups) {
					t.Fatalf("%+v on %d devices: %d sizes, %v", o, n, len(all), err)
				}
				var threads, connections int
				var staging int64
				for _, z := range all {
					threads, connections, staging = threads+z.threads, connections+z.connections, staging+z.staging
					if z.threads < 1 || z.streams < 1 || z.chunk < minChunk || z.staging < int64(z.chunk) || z.scratch != 0 ||
						far != (z.connections > 0) || o.Streams != 0 && z.streams != o.Streams || o.Chunk != 0 && z.chunk != o.Chunk {
						t.Errorf("%+v on %d devices, remote %v: %+v", o, n, far, z)
					}
				}
				wantThreads := max(len(all), o.Threads)
				if o.Threads == 0 {
					wantThreads = max(len(all), min(runtime.GOMAXPROCS(0), len(all)*maxDefaultThreads))
				}
				wantConnections := map[bool]int{false: 0, true: defaultConnections}[far]
				if far && o.Connections != 0 {
					wantConnections = o.Connections
				}
				if threads != wantThreads || connections != wantConnections {
					t.Errorf("%+v on %d devices, remote %v: %d threads, %d connections", o, n, far, threads, connections)
				}
				limit := o.Staging
				if limit == 0 {
					limit = int64(len(all)) * max(maxDefaultStaging, 2*int64(o.Chunk))
				}
				if staging > limit {
					t.Errorf("%+v on %d devices, remote %v: %d bytes of staging memory", o, n, far, staging)
				}
			}
		}
	}
}

// TestRemoteSizes: a remote model on several devices is read with as many connections as one on one device.
func TestRemoteSizes(t *testing.T) {
	t.Parallel()
	s := serveFiles(t, "../testdata")
	far := openRemote(t, remoteClient(t), s.URL+"/tiny-llama.gguf")
	for _, by := range bothSplits {
		devs, _ := openDevices(t, 2, soft.Options{})
		o := tight.on(2)
		o.Split.By, o.Connections = by, 6
		w, err := load(t.Context(), far, o, devs...)
		if err != nil {
			t.Fatal(err)
		}
		r := w.Report()
		if r.Connections < 2 || r.Connections > 6 || r.RemoteBytes != r.ReadBytes || r.ReadBytes != w.Plan().ReadBytes() {
			t.Errorf("%v: %+v", by, r)
		}
		if err := verify(t.Context(), w, far); err != nil {
			t.Error(err)
		}
		mustClose(t, w)
		all, err := sizesOf(w.Plan(), Config{}, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		sum := 0
		for _, z := range all {
			sum += z.connections
			if z.workers() != z.connections {
				t.Errorf("%v: %d workers for %d connections", by, z.workers(), z.connections)
			}
		}
		if sum != defaultConnections {
			t.Errorf("%v: %d connections, want %d", by, sum, defaultConnections)
		}
	}
}

// TestTooLittleStaging wants staging memory that does not hold a chunk for each device to be refused.
func TestTooLittleStaging(t *testing.T) {
	t.Parallel()
	p := planFor(t, llama(t), options{}, 2)
	_, err := sizesOf(p, Config{Staging: 64 << 10}, false, nil)
	if !errors.Is(err, ErrBadOption) || !strings.Contains(err.Error(), "32768 for each of 2 devices") {
		t.Errorf("got %v", err)
	}
}

// TestLargeLoads wants larger chunks for large loads that convert, and for nothing else.
func TestLargeLoads(t *testing.T) {
	t.Parallel()
	m := openModel(t, sparse(t, 3, 1<<30)) // 6 GiB of F16
	for _, test := range []struct {
		o     options
		far   bool
		chunk int
	}{
		{options{Policy: plan.BF16}, false, 2 * defaultChunk},
		{options{Policy: plan.BF16}, true, defaultChunk},
		{options{Policy: plan.F16}, false, defaultChunk}, // nothing to convert
		{options{Policy: plan.Raw}, false, defaultChunk},
		{options{Policy: plan.BF16, Tensors: regexp.MustCompile(`blk\.0`)}, false, defaultChunk},
		{options{Policy: plan.BF16, Chunk: 1 << 20}, false, 1 << 20},
		{options{Policy: plan.BF16, Staging: 64 << 20}, false, defaultChunk},
	} {
		all, err := sizesOf(planFor(t, m, test.o, 1), test.o.config(), test.far, nil)
		if err != nil {
			t.Fatal(err)
		}
		if z := all[0]; z.chunk != test.chunk || z.staging < 2*int64(test.chunk) || z.staging > maxDefaultStaging {
			t.Errorf("%+v: chunks of %d bytes, %d staging; want chunks of %d", test.o, z.chunk, z.staging, test.chunk)
		}
	}
	p := planFor(t, m, options{Policy: plan.BF16}, 1)
	expand := [][]bool{{true, true, true}}
	all, err := sizesOf(p, Config{}, false, expand)
	if err != nil {
		t.Fatal(err)
	}
	if z := all[0]; z.chunk != defaultChunk || z.streams != expandStreams || z.scratch != expandStreams {
		t.Errorf("the device converts: %+v, want chunks of %d", z, defaultChunk)
	}
}

// TestSmallLoads wants no more memory than there is to load.
func TestSmallLoads(t *testing.T) {
	t.Parallel()
	m := openModel(t, small)
	p := planFor(t, m, options{}, 1)
	all, err := sizesOf(p, Config{}, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if z := all[0]; uint64(z.chunk) >= p.DeviceBytes()+minChunk || z.staging >= 2*int64(z.chunk) {
		t.Errorf("%+v for %d bytes", z, p.DeviceBytes())
	}
	dev, sw := openDevice(t, soft.Options{})
	w, err := load(t.Context(), m, options{}, dev)
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, w)
	if n := sw.Stats().PeakPinnedBytes; n > 2<<20 { // a huge page at least is what staging memory is
		t.Errorf("%d bytes were pinned for %d", n, p.DeviceBytes())
	}
}
