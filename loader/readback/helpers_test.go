package readback

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

const sample = "../../testdata/tiny-llama.gguf"

func open(t testing.TB, path string) *gguf.File {
	t.Helper()
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// devices returns n devices of a new software machine, whose memory does not begin with zeros.
func devices(t testing.TB, n int) []*amdhip.Device {
	t.Helper()
	rt, err := soft.OpenRuntime(soft.Options{Devices: n, Poison: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s := soft.Of(rt).Stats(); s.Allocations+s.HostAllocations+s.Registrations+s.Streams+s.Events != 0 {
			t.Errorf("left behind: %+v", s)
		}
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	var all []*amdhip.Device
	for i := range n {
		d, err := rt.Device(i)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, d)
	}
	return all
}

// load puts f on the devices, until the end of the test.
func load(t testing.TB, f *gguf.File, s plan.Spec, devs ...*amdhip.Device) *loader.Model {
	t.Helper()
	m, err := loader.Load(t.Context(), f, s, devs...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// made is a tensor of a made-up model. Without data it has random bytes.
type made struct {
	name  string
	typ   gguf.Type
	shape []uint64
	data  []byte
}

// write writes a model and opens it.
func write(t testing.TB, metadata map[string]any, all []made) *gguf.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "made.gguf")
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	w := gguf.NewWriter(out, gguf.WriterOptions{})
	for key, value := range metadata {
		err = errors.Join(err, w.Set(key, value))
	}
	for _, x := range all {
		err = errors.Join(err, w.AddTensor(x.name, x.typ, x.shape...))
	}
	err = errors.Join(err, w.WriteHeader())
	for _, x := range all {
		err = errors.Join(err, w.WriteTensor(x.name, x.bytes()))
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return open(t, path)
}

// bytes are those of the tensor: given ones, or such as depend on its name.
func (x *made) bytes() []byte {
	if x.data != nil {
		return x.data
	}
	elems := uint64(1)
	for _, n := range x.shape {
		elems *= n
	}
	n, _ := x.typ.Bytes(elems)
	seed := uint64(len(x.name))
	for _, c := range x.name {
		seed = seed*31 + uint64(c)
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(rng.Uint32()) & 0x3f // no value is out of the range of F16
	}
	return data
}

// sliced is a model that two ranks can divide: by rows, by columns, and in several pieces. Its tensors are in the given
// order.
func sliced(t testing.TB, reverse bool) *gguf.File {
	all := []made{
		{"token_embd.weight", gguf.Q8_0, []uint64{64, 33}, nil},
		{"blk.0.attn_q.weight", gguf.F32, []uint64{64, 64}, nil},
		{"blk.0.attn_output.weight", gguf.Q8_0, []uint64{64, 64}, nil},
		{"blk.0.attn_norm.weight", gguf.F32, []uint64{64}, nil},
		{"blk.0.ffn_up.weight", gguf.F16, []uint64{64, 128}, nil},
		{"blk.0.ffn_down.weight", gguf.Q4_0, []uint64{128, 64}, nil},
		{"blk.1.ffn_gate_exps.weight", gguf.BF16, []uint64{64, 4, 8}, nil},
		{"blk.1.counts", gguf.I32, []uint64{5}, nil},
	}
	if reverse {
		slices.Reverse(all)
	}
	return write(t, map[string]any{"general.architecture": "x", "x.attention.head_count": uint32(2)}, all)
}

// floats are the bytes of 32-bit numbers.
func floats(bits ...uint32) (b []byte) {
	for _, x := range bits {
		b = binary.LittleEndian.AppendUint32(b, x)
	}
	return b
}
