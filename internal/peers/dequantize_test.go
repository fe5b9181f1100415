package peers

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// TestDequantizeAsGGUFPy compares the values of random blocks, of every type that gguf-py knows, in every tier that the
// CPU has. Blocks are of random bytes, so that infinities and NaNs are among the scales; which NaN it is may differ.
func TestDequantizeAsGGUFPy(t *testing.T) {
	t.Parallel()
	p := startPeer(t)
	seed := seedOf(t)
	rng := rand.New(rand.NewPCG(seed, 2))
	types, elements := 0, 0
	for _, typ := range gguf.Types() {
		blocks := make([]byte, typ.BlockBytes()*(1+1<<15/typ.BlockElems()))
		for i := range blocks {
			blocks[i] = byte(rng.Uint32())
		}
		want := p.dequantize(t, uint32(typ), blocks)
		if want == nil {
			t.Logf("gguf-py does not decode %v", typ)
			continue
		}
		types++
		for _, isa := range kernels.Supported() {
			k, err := kernels.For(isa)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if err := k.Dequantize(got, gguf.F32, blocks, typ); err != nil {
				t.Fatal(err)
			}
			if i := differs(got, want); i >= 0 {
				t.Errorf("%v, %v: element %d is %x, gguf-py has %x (seed %d)", typ, isa, i, got[4*i:4*i+4], want[4*i:4*i+4], seed)
			}
			elements += len(got) / 4
		}
	}
	t.Logf("%d types, %d elements", types, elements)
	if types < 20 {
		t.Errorf("gguf-py decodes only %d types", types)
	}
}

// differs returns the first element in which float32 values differ, -1 if there is none. All NaNs are the same.
func differs(a, b []byte) int {
	if len(a) != len(b) {
		return min(len(a), len(b)) / 4
	}
	for i := 0; i < len(a); i += 4 {
		x, y := binary.LittleEndian.Uint32(a[i:]), binary.LittleEndian.Uint32(b[i:])
		nan := func(v uint32) bool { return v&0x7fffffff > 0x7f800000 }
		if x != y && !(nan(x) && nan(y)) && !bytes.Equal(a[i:i+4], b[i:i+4]) {
			return i / 4
		}
	}
	return -1
}
