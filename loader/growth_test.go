package loader

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// sparse makes a model of n tensors of elems F16 elements each whose data is a hole in the file.
func sparse(tb testing.TB, n int, elems uint64) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "sparse.gguf")
	f, err := os.Create(path)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	w := gguf.NewWriter(f, gguf.WriterOptions{})
	for i := range n {
		if err := w.AddTensor(fmt.Sprintf("blk.%d.weight", i), gguf.F16, elems); err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.WriteHeader(); err != nil {
		tb.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		tb.Fatal(err)
	}
	size := info.Size() + 64 + int64(n)*int64(elems*2+31)&^31
	if err := f.Truncate(size); err != nil {
		if size > 1<<40 {
			tb.Skipf("this file system has no files of %d bytes: %v", size, err)
		}
		tb.Fatal(err)
	}
	return path
}

// bookkeeping does all that a load does before the first byte is read, but for the device's part.
func bookkeeping(tb testing.TB, path string) (chunks int) {
	m, err := gguf.Open(path)
	if err != nil {
		tb.Fatal(err)
	}
	defer m.Close()
	p, err := plan.New(m, plan.Spec{Policy: plan.Raw}, []uint64{1 << 60})
	if err != nil {
		tb.Fatal(err)
	}
	all, err := sizesOf(p, Config{}, false, nil)
	if err != nil {
		tb.Fatal(err)
	}
	c := p.Groups[0].Cut(plan.CutOptions{Bytes: all[0].chunk, Ramp: all[0].threads})
	newModel(p, []*amdhip.Device{nil}).parts[0].ready.expect(c)
	s, err := read.Open(m, &p.Groups[0], c, read.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	s.Close()
	return len(c)
}

// BenchmarkGrowth shows what planning and bookkeeping cost for many tensors and for a huge file.
func BenchmarkGrowth(b *testing.B) {
	for _, size := range []struct {
		tensors int
		elems   uint64
	}{{1_000, 256}, {10_000, 256}, {100_000, 256}, {1_000, 512 << 20}} {
		b.Run(fmt.Sprintf("tensors=%d/GB=%d", size.tensors, uint64(size.tensors)*size.elems*2/1e9), func(b *testing.B) {
			path := sparse(b, size.tensors, size.elems)
			b.ReportAllocs()
			for b.Loop() {
				bookkeeping(b, path)
			}
		})
	}
}

// TestGrowth wants bookkeeping to allocate in proportion to tensors and chunks, also for a file of a terabyte.
func TestGrowth(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("only Linux is sure to make sparse files of a terabyte")
	}
	if !alone(t) {
		return
	}
	allocated := func(n int, elems uint64) (bytes, chunks uint64) {
		path := sparse(t, n, elems)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		c := bookkeeping(t, path)
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc, uint64(c)
	}
	small, _ := allocated(1_000, 256)
	large, _ := allocated(100_000, 256)
	if large > 150*small {
		t.Errorf("%d bytes are allocated for 1,000 tensors and %d for 100,000: not linear", small, large)
	}
	tera, chunks := allocated(1_000, 512<<20)
	if tera > 1<<20+400*chunks {
		t.Errorf("%d bytes are allocated for a file of a terabyte in %d chunks", tera, chunks)
	}
}
