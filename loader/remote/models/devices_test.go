package models_test

import (
	"bytes"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/fake"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// layered makes a model with the tensors of llama.cpp's files in that order: the output, which the last device gets, is
// first, and so many layers of so many bytes follow.
func layered(t *testing.T, layers, size int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gguf.NewWriter(&b, gguf.WriterOptions{})
	w.Set("general.architecture", "llama")
	w.Set("llama.block_count", uint32(layers))
	names := []string{"output.weight", "token_embd.weight"}
	for i := range layers {
		names = append(names, fmt.Sprintf("blk.%d.attn_norm.weight", i), fmt.Sprintf("blk.%d.ffn_up.weight", i))
	}
	data := make([]byte, size)
	sizeOf := func(i int) int {
		if i >= 2 && i%2 == 0 {
			return 4096
		}
		return size
	}
	for i, name := range names {
		w.AddTensor(name, gguf.I8, uint64(sizeOf(i)))
	}
	w.WriteHeader()
	for i, name := range names {
		for k := 0; k < len(data); k += 512 {
			data[k] = byte(k>>9 + i)
		}
		w.WriteTensor(name, data[:sizeOf(i)])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// counted counts the bytes of a reply.
type counted struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c counted) Write(b []byte) (int, error) {
	c.n.Add(int64(len(b)))
	return c.ResponseWriter.Write(b)
}

// TestLayersOfACheckedModel: a model whose digest is checked comes once, though its layers go to several devices: they
// are read in the order of the file. All of it arrives where it should.
func TestLayersOfACheckedModel(t *testing.T) {
	t.Parallel()
	model := layered(t, 14, 16<<20)
	registry := fake.NewRegistry()
	defer registry.Close()
	registry.Add("library/m/latest", model)
	var sent atomic.Int64
	var loading atomic.Bool
	registry.Store.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		w = counted{w, &sent}
		if loading.Load() { // no faster than any processor computes digests
			w = &paced{ResponseWriter: w, rate: 4 << 20}
		}
		fake.Serve(w, r, model)
		return true
	})
	p := places{hub: fake.NewHub(), registry: registry, bucket: fake.NewServer(http.NotFoundHandler())}
	defer p.hub.Close()
	defer p.bucket.Close()
	for _, n := range []int{2, 4} {
		rt, err := soft.OpenRuntime(soft.Options{Devices: n})
		if err != nil {
			t.Fatal(err)
		}
		var devs []*amdhip.Device
		for i := range n {
			d, err := rt.Device(i)
			if err != nil {
				t.Fatal(err)
			}
			devs = append(devs, d)
		}
		o := p.opener(remote.DigestsAuto)
		f, err := o.Open(t.Context(), "oci://"+registry.URL[len("https://"):]+"/library/m")
		if err != nil {
			t.Fatal(err)
		}
		sent.Store(0)
		loading.Store(true)
		m, err := loader.Load(t.Context(), f, plan.Spec{Policy: plan.Raw}, devs...)
		if err != nil {
			t.Fatal(err)
		}
		loading.Store(false)
		// A range that is not read to its end may have been sent some more of.
		if twice := sent.Load() - int64(len(model)); twice > int64(len(model))/50 {
			t.Errorf("on %d devices %d bytes were sent twice, of %d", n, twice, len(model))
		}
		if id, _ := remote.Identify(f.Parts()[0]); !id.Checked {
			t.Errorf("on %d devices: %+v", n, id)
		}
		if r, err := readback.Verify(t.Context(), m, f); err != nil || r.Tensors != len(f.Tensors()) {
			t.Errorf("on %d devices: %+v, %v", n, r, err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		f.Close()
		o.Close()
		rt.Close()
	}
}
