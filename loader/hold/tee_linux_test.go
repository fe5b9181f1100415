package hold

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// far opens files whose names begin with far: as if they were on a server, and counts the bytes that are read.
type far struct {
	read   atomic.Int64
	fail   atomic.Int64 // reads fail once so many bytes have been read; 0: they do not
	failed error
}

// farFile is one of them.
type farFile struct {
	*far
	path string
	data []byte
}

func (f *far) Opens(name string) bool { return strings.HasPrefix(name, "far:") }

func (f *far) Open(ctx context.Context, name string) (*gguf.File, error) {
	path := strings.TrimPrefix(name, "far:")
	return gguf.OpenSource(ctx, filepath.Base(path), func(context.Context, string) (gguf.Source, error) {
		b, err := os.ReadFile(path)
		return &farFile{f, path, b}, err
	})
}

func (f *farFile) Path() string { return "https://example.com" + f.path }
func (f *farFile) Size() int64  { return int64(len(f.data)) }
func (f *farFile) Close() error { return nil }

func (f *farFile) Identity() gguf.Identity {
	return gguf.Identity{Digest: "sha256:" + strings.Repeat("ab", 32)}
}

func (f *farFile) Range(ctx context.Context, off, n int64) io.ReadCloser {
	return io.NopCloser(&counted{f, bytes.NewReader(f.data[off : off+n])})
}

// counted counts what is read.
type counted struct {
	of *farFile
	io.Reader
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b[:min(len(b), 32<<10)])
	sum := c.of.read.Add(int64(n))
	if most := c.of.fail.Load(); most > 0 && sum > most {
		return 0, c.of.failed
	}
	return n, err
}

// TestFetchedOnce: a model on a server that gets a copy in page-locked memory is fetched once, whoever converts and
// whatever is proved. It is woken from that without another byte.
func TestFetchedOnce(t *testing.T) {
	t.Parallel()
	path, err := filepath.Abs(sample)
	if err != nil {
		t.Fatal(err)
	}
	whole := openFile(t, path)
	var tensors int64
	for _, x := range whole.Tensors() {
		tensors += x.Size
	}
	header := int64(whole.Size()) - tensors // of that, what is before the tensors, and padding
	for name, how := range map[string]Options{
		"raw":    {Spec: plan.Spec{Policy: plan.Raw}},
		"cpu":    {Config: loader.Config{Dequant: loader.DequantCPU}},
		"gpu":    {Config: loader.Config{Dequant: loader.DequantGPU}},
		"prove":  {Request: loader.Request{Prove: loader.ProveOn, Check: true}},
		"copies": {Spec: plan.Spec{Policy: plan.Raw, Split: plan.Split{By: plan.SplitNone}}},
		"part":   {Ranks: []int{1}, Spec: plan.Spec{Shard: plan.Shard{By: plan.ShardLayers, World: 2}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := new(far)
			o := how
			o.Opener, o.RAM, o.slabBytes = f, 64<<20, slab
			config := tight()
			config.Dequant, config.Staging = o.Config.Dequant, 2*config.Staging
			o.Config = config
			h := hold(t, o, soft.Options{Devices: 2}).with(t, "m", "far:"+path)
			h.wantState(t, "m", stateResident, true)
			m, err := h.Model("m")
			if err != nil {
				t.Fatal(err)
			}
			var want int64
			for _, x := range m.Plan().Tensors() {
				want += x.Size
			}
			// The header is read to open the file, with more than it has, and to identify it.
			opening := int64(1<<20) + 2*header
			if n := f.read.Load(); n < want || n > want+opening {
				t.Errorf("%d bytes were fetched for tensors of %d, and at most %d to open the file", n, want, opening)
			}
			before := f.read.Load()
			for range 2 {
				if err := errors.Join(h.Sleep(t.Context(), "m"), h.Wake(t.Context(), "m")); err != nil {
					t.Fatal(err)
				}
			}
			if n := f.read.Load() - before; n != 0 {
				t.Errorf("waking fetched %d bytes", n)
			}
			a := h.attach(t, "m")
			if name != "part" {
				wantContents(t, a.Model, whole)
			}
			if r := m.Report(); r.ImageBytes != 0 {
				t.Errorf("the first load was one from page-locked memory: %+v", r)
			}
		})
	}
}

// TestNotFetchedOnce: a model whose copy does not fit is loaded all the same, and a load that fails gives its memory
// back.
func TestNotFetchedOnce(t *testing.T) {
	t.Parallel()
	path, err := filepath.Abs(sample)
	if err != nil {
		t.Fatal(err)
	}
	f := &far{failed: errors.New("the line is dead")}
	h := hold(t, Options{Opener: f, RAM: 3 << 20, slabBytes: slab, Share: ShareFD}, soft.Options{Devices: 1})
	f.fail.Store(2 << 20)
	if _, err := h.Add(t.Context(), "dead", "far:"+path); err != nil {
		t.Fatal(err)
	}
	if err := h.Wait(t.Context(), "dead"); err == nil || !strings.Contains(err.Error(), "the line is dead") {
		t.Fatalf("%v", err)
	}
	if err := h.Drop("dead"); err != nil {
		t.Fatal(err)
	}
	f.fail.Store(0)
	// All memory is there again, for one of them; then it is the pinned one's.
	h.with(t, "a", "far:"+path)
	h.wantState(t, "a", stateResident, true)
	if err := h.Pin("a"); err != nil {
		t.Fatal(err)
	}
	n := f.read.Load()
	h.with(t, "b", "far:"+path)
	h.background.Wait()
	if m := h.wantState(t, "b", stateResident, false); m.Error != "" {
		t.Errorf("%+v", m)
	}
	if got := f.read.Load() - n; got > 2*int64(openFile(t, path).Size()) {
		t.Errorf("%d bytes were fetched", got)
	}
	wantContents(t, h.attach(t, "b").Model, openFile(t, path))
	// A copy that is not pinned makes room.
	if err := h.Unpin("a"); err != nil {
		t.Fatal(err)
	}
	h.with(t, "c", "far:"+path)
	h.wantState(t, "c", stateResident, true)
	h.wantState(t, "a", stateResident, false)
}
