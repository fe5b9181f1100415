package loader_test

import (
	"bytes"
	"context"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/trace"
)

// onCPU computes the network from the file.
func (n network) onCPU(t *testing.T, file *gguf.File) floats32 {
	t.Helper()
	k, err := kernels.For(kernels.Generic)
	if err != nil {
		t.Fatal(err)
	}
	weights := func(name string) floats32 {
		x, ok := file.Tensor(name)
		if !ok {
			t.Fatalf("no tensor %s", name)
		}
		b := make([]byte, 4*x.Elems())
		if err := k.Dequantize(b, gguf.F32, file.Data(x), x.Type); err != nil {
			t.Fatal(err)
		}
		return b
	}
	x, normed, middle := make(floats32, 4*n.width), make(floats32, 4*n.width), make(floats32, 4*n.inner)
	n.input(x)
	for layer := range n.layers {
		norm, up, down := n.tensors(layer)
		rmsNorm(normed, x, weights(norm), n.width, n.eps)
		matVec(middle, weights(up), normed, nil, n.inner, n.width)
		matVec(x, weights(down), middle, x, n.width, n.inner)
	}
	return x
}

// computeDevices are the software device, and the GPU of the library that AMDHIP_HARDWARE names.
func computeDevices(t *testing.T, run func(t *testing.T, dev *amdhip.Device)) {
	t.Helper()
	closing := func(t *testing.T, dev *amdhip.Device) {
		if err := dev.Runtime().Close(); err != nil {
			t.Error(err)
		}
	}
	t.Run("soft", func(t *testing.T) {
		dev, err := soft.Open(soft.Options{Poison: true, LinkBytesPerSecond: 200e6})
		if err != nil {
			t.Fatal(err)
		}
		defer closing(t, dev)
		run(t, dev)
	})
	t.Run("hardware", func(t *testing.T) {
		library := os.Getenv("AMDHIP_HARDWARE")
		if library == "" {
			t.Skip("AMDHIP_HARDWARE names no library to compute with on a GPU")
		}
		rt, err := amdhip.Open(amdhip.Options{Library: library})
		if err != nil {
			t.Fatal(err)
		}
		dev, err := rt.Device(0)
		if err != nil {
			t.Fatal(err)
		}
		defer closing(t, dev)
		run(t, dev)
	})
}

// TestComputeWhileLoading computes with the first layer while the load is held up before its end, compares the result
// with the CPU's, and wants the trace to show that computing overlapped loading. A program that had to wait for the
// whole model would never get there.
func TestComputeWhileLoading(t *testing.T) {
	t.Parallel()
	file, err := gguf.Open("../testdata/tiny-llama.gguf")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	net := newNetwork(file)
	want := net.onCPU(t, file)
	computeDevices(t, func(t *testing.T, dev *amdhip.Device) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		// So little staging memory that the load cannot end while Progress does not return.
		config := loader.Config{Chunk: 64 << 10, Staging: 4 * 64 << 10, Threads: 2, Streams: 2}
		l, err := loader.New([]*amdhip.Device{dev}, config)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		p, err := l.Plan(file, plan.Spec{Policy: plan.F32})
		if err != nil {
			t.Fatal(err)
		}
		e, err := newEngine(dev, net)
		if err != nil {
			t.Fatal(err)
		}
		defer e.close()
		var tr trace.Trace
		e.tr = &tr
		computed := make(chan struct{})
		var once sync.Once
		var atFirst int // the last layer whose tensors had all arrived when the first was computed
		model, err := l.Start(ctx, p, loader.Request{Trace: &tr, Progress: func(done, total int64) {
			if done > total*6/10 { // the first layer has arrived, the last has not
				select {
				case <-computed:
				case <-ctx.Done():
				}
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		defer model.Close()
		e.afterLayer = func(int) {
			once.Do(func() {
				soon, stop := context.WithCancel(ctx)
				stop()
				for atFirst = 0; atFirst < net.layers; atFirst++ {
					_, _, down := net.tensors(atFirst)
					if model.Wait(soon, down) != nil {
						break
					}
				}
				close(computed)
			})
		}
		got, err := e.run(ctx, model)
		if err != nil {
			t.Fatal(err)
		}
		if atFirst == 0 || atFirst == net.layers {
			t.Errorf("when the first layer was computed, %d of %d layers had arrived", atFirst, net.layers)
		}
		for i := range net.width {
			a, b := float64(got.at(i)), float64(want.at(i))
			if math.Abs(a-b) > 1e-3*max(1, math.Abs(b)) || math.IsNaN(a) {
				t.Fatalf("element %d is %v, want %v", i, a, b)
			}
		}
		if err := model.WaitAll(ctx); err != nil {
			t.Fatal(err)
		}
		checkOverlap(t, &tr, net.layers)
	})
}

// checkOverlap wants every layer in the trace, and copies behind the first. TRACE_DIR keeps the trace, for Perfetto.
func checkOverlap(t *testing.T, tr *trace.Trace, layers int) {
	t.Helper()
	var out bytes.Buffer
	if _, err := tr.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	if dir := os.Getenv("TRACE_DIR"); dir != "" {
		name := "compute-" + strings.ReplaceAll(t.Name(), "/", "-") + ".json"
		if err := os.WriteFile(filepath.Join(dir, name), out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	type event struct {
		Name    string
		Ph      string
		TS, Dur float64
		TID     int
		Args    map[string]any
	}
	var events []event
	if err := json.Unmarshal(out.Bytes(), &events); err != nil {
		var object struct{ TraceEvents []event }
		if err := json.Unmarshal(out.Bytes(), &object); err != nil {
			t.Fatal(err)
		}
		events = object.TraceEvents
	}
	tracks := make(map[int]string)
	for _, e := range events {
		if e.Ph == "M" && e.Name == "thread_name" {
			tracks[e.TID], _ = e.Args["name"].(string)
		}
	}
	first, lastCopy, found := math.Inf(1), 0.0, 0
	for _, e := range events {
		switch track := tracks[e.TID]; {
		case e.Ph != "X":
		case track == "compute":
			first = min(first, e.TS+e.Dur)
			found++
		case strings.HasPrefix(track, "stream "):
			lastCopy = max(lastCopy, e.TS+e.Dur)
		}
	}
	t.Logf("the first layer was computed at %.3f ms, the last copy ended at %.3f ms", first/1e3, lastCopy/1e3)
	if found != layers || first >= lastCopy {
		t.Errorf("%d of %d layers in the trace; the first ended at %.0f µs, the last copy at %.0f µs", found, layers, first, lastCopy)
	}
}
