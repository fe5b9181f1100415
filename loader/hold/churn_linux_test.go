package hold

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// tiny writes a model of a few KiB.
func tiny(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := gguf.NewWriter(f, gguf.WriterOptions{})
	data := make([]byte, 4096)
	for i := range data {
		data[i] = byte(i * 5)
	}
	err = errors.Join(w.Set("general.architecture", "x"), w.AddTensor("a", gguf.I8, 4096), w.AddTensor("b", gguf.I8, 100),
		w.WriteHeader(), w.WriteTensor("a", data), w.WriteTensor("b", data[:100]), w.Close())
	if err != nil {
		t.Fatal(err)
	}
}

// TestChurn does 100,000 random things with 20 models under budgets for five in device memory and eight in page-locked
// memory. Neither budget is ever exceeded, nothing fails but for what is said to, and all models are right in the end.
func TestChurn(t *testing.T) {
	t.Parallel()
	const models, workers = 20, 8
	operations := 100_000
	if testing.Short() {
		operations = 5_000
	}
	const vram, ram = 5 * sharedAlign, 8 * slabAlign
	o := Options{VRAM: vram, RAM: ram, Spec: plan.Spec{Policy: plan.Raw}, Share: ShareFD, slabBytes: slabAlign}
	o.Config = loader.Config{Chunk: 64 << 10, Staging: 64 << 10, Threads: 1, Streams: 1}
	h := hold(t, o, soft.Options{Memory: 64 << 20})
	dir := t.TempDir()
	name := func(i int) string { return fmt.Sprintf("m%d", i) }
	for i := range models {
		path := filepath.Join(dir, name(i))
		tiny(t, path)
		h.with(t, name(i), path)
	}
	allowed := []error{ErrAttached, ErrPinned, ErrUnknownModel, ErrModelExists, loader.ErrInsufficientMemory}
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 16))
			for range operations / workers {
				if what, err := h.randomly(t.Context(), rng, dir, name(rng.IntN(models))); err != nil {
					ok := false
					for _, e := range allowed {
						ok = ok || errors.Is(err, e)
					}
					if !ok {
						t.Errorf("%s: %v", what, err)
						return
					}
				}
				h.mu.Lock()
				claimed := h.claimed[0]
				h.mu.Unlock()
				if claimed > vram || h.pool.bytes() > ram {
					t.Errorf("%d bytes of device memory, %d of page-locked memory: the budgets are %d and %d", claimed, h.pool.bytes(), vram, ram)
					return
				}
			}
		})
	}
	all.Wait()
	s := h.soft.Stats()
	if s.PeakDeviceBytes > vram+sharedAlign { // once, at the start, virtual memory was tried
		t.Errorf("%d bytes of device memory at most, the budget is %d", s.PeakDeviceBytes, vram)
	}
	if s.PeakPinnedBytes > ram+1<<20 {
		t.Errorf("%d bytes of page-locked memory at most, the budget is %d", s.PeakPinnedBytes, ram)
	}
	h.mu.Lock()
	t.Logf("%d wakes, %d evictions, %d attachments", h.wakes, h.evictions, h.attached)
	h.mu.Unlock()
	for i := range models {
		if err := h.Unpin(name(i)); err != nil && !errors.Is(err, ErrUnknownModel) {
			t.Error(err)
		}
	}
	for i := range models {
		path := filepath.Join(dir, name(i))
		if _, err := h.Add(t.Context(), name(i), path); err != nil && !errors.Is(err, ErrModelExists) {
			t.Fatal(err)
		}
		if err := h.Wake(t.Context(), name(i)); err != nil {
			t.Fatal(err)
		}
		m, err := h.Model(name(i))
		if err != nil {
			t.Fatal(err)
		}
		wantContents(t, m, openFile(t, path))
	}
}

// randomly does one of the things that can be done with a model.
func (h *testHolder) randomly(ctx context.Context, rng *rand.Rand, dir, name string) (string, error) {
	switch n := rng.IntN(100); {
	case n < 70:
		m, r, err := h.enter(ctx, &request{Model: name})
		if err != nil {
			return "attach", err
		}
		err = h.wait(ctx, r)
		h.leave(m, r)
		return "attach", err
	case n < 78:
		return "sleep", h.Sleep(ctx, name)
	case n < 86:
		return "wake", h.Wake(ctx, name)
	case n < 89:
		return "pin", h.Pin(name)
	case n < 96:
		return "unpin", h.Unpin(name)
	case n < 97:
		return "drop", h.Drop(name)
	}
	_, err := h.Add(ctx, name, filepath.Join(dir, name))
	return "add", err
}
