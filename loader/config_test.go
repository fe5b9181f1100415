package loader

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TestNames reads the names that IO and Dequant print.
func TestNames(t *testing.T) {
	t.Parallel()
	for want, name := range map[IO]string{IOAuto: "auto", IOMapped: "mmap", IODirect: "direct"} {
		var got IO
		if err := got.UnmarshalText([]byte(strings.ToUpper(name))); err != nil || got != want || got.String() != name {
			t.Errorf("%s is read as %v, %v", name, got, err)
		}
	}
	for want, name := range map[Dequant]string{DequantAuto: "auto", DequantCPU: "cpu", DequantGPU: "gpu"} {
		var got Dequant
		if err := got.UnmarshalText([]byte(name)); err != nil || got != want || got.String() != name {
			t.Errorf("%s is read as %v, %v", name, got, err)
		}
	}
	if err := new(Dequant).UnmarshalText([]byte("tpu")); err == nil || !strings.Contains(err.Error(), "auto, cpu, gpu") {
		t.Errorf("got %v, want what is allowed", err)
	}
	if err := new(IO).UnmarshalText(nil); err == nil || !strings.Contains(err.Error(), "auto, mmap, direct") {
		t.Errorf("got %v, want what is allowed", err)
	}
	if s := fmt.Sprint(IO(9), Dequant(77)); !strings.Contains(s, "9") || !strings.Contains(s, "77") {
		t.Errorf("numbers without names print as %q", s)
	}
}

// TestBadOptions wants what makes no sense to be refused before a device is touched: unknown values of enumerations and
// empty rules among it.
func TestBadOptions(t *testing.T) {
	t.Parallel()
	m := openModel(t, sample)
	dev, sw := openDevice(t, soft.Options{})
	for _, o := range []options{
		{Streams: -1},
		{Streams: 257},
		{Threads: -1},
		{Threads: 1 << 20},
		{Connections: -1},
		{Connections: 257},
		{Chunk: 1},
		{Chunk: 1 << 31},
		{Staging: 1},
		{Staging: -1},
		{Staging: 1 << 20, Chunk: 2 << 20},
		{Stall: -1},
		{IO: 3},
		{IO: 255},
		{Dequant: 3},
		{Dequant: 77},
		{Policy: 4},
		{Policy: 99},
		{Rules: []plan.Rule{{}}},
		{Rules: []plan.Rule{{Name: regexp.MustCompile("x"), Policy: 9}}},
		{Split: plan.Split{By: 2}},
		{Shard: plan.Shard{By: 3}},
		{Shard: plan.Shard{By: plan.ShardTensors, World: 2, Rules: []plan.ShardRule{{}}}},
	} {
		for name, load := range map[string]loadFunc{"Load": load, "LoadSync": loadSync} {
			if w, err := load(t.Context(), m, o, dev); w != nil || !errors.Is(err, ErrBadOption) {
				t.Errorf("%s of %+v: %v, want ErrBadOption", name, o, err)
			}
		}
	}
	if w, err := load(t.Context(), m, options{ISA: kernels.ISA(99)}, dev); w != nil || err == nil {
		t.Error("kernels of an unknown tier: no error")
	}
	if n := sw.Calls()["hipMalloc"] + sw.Calls()["hipStreamCreateWithFlags"]; n != 0 {
		t.Errorf("%d calls for options that were refused", n)
	}
}

// TestInsufficientMemory wants what does not fit to be refused before anything is allocated, with what would fit.
func TestInsufficientMemory(t *testing.T) {
	t.Parallel()
	m := openModel(t, sample)
	for _, test := range []struct {
		memory  uint64
		fitting string
	}{
		{planned(t, m, options{Policy: plan.Raw}).DeviceBytes() + 4096, "it would fit as raw"},
		{64 << 10, "no dtype fits"},
	} {
		dev, sw := openDevice(t, soft.Options{Memory: test.memory})
		for name, load := range map[string]loadFunc{"Load": load, "LoadSync": loadSync} {
			_, err := load(t.Context(), m, options{Policy: plan.F32}, dev)
			e, ok := errors.AsType[*plan.MemoryError](err)
			if !ok || !errors.Is(err, ErrInsufficientMemory) || !strings.Contains(err.Error(), test.fitting) ||
				e.Needed <= e.Free || e.Name != dev.Name() {
				t.Errorf("%s into %d bytes: %v, want %q", name, test.memory, err, test.fitting)
			}
		}
		if n := sw.Calls()["hipMalloc"]; n != 0 {
			t.Errorf("%d allocations before the check", n)
		}
	}
}
