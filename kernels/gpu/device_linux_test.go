package gpu

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// openGPU opens the first GPU of this machine, or skips.
func openGPU(t testing.TB) *amdhip.Device {
	t.Helper()
	rt, err := amdhip.Open(amdhip.Options{})
	if errors.Is(err, amdhip.ErrNoLibrary) {
		t.Skipf("kernels run on no GPU, there is no HIP library: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	dev, err := rt.Device(0)
	if errors.Is(err, amdhip.ErrNoDevice) {
		t.Skipf("kernels run on no GPU: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// TestKernelsOnGPU runs every kernel on this machine's GPU, on all golden vectors and on many random blocks, and
// compares with the generic code of package kernels.
func TestKernelsOnGPU(t *testing.T) {
	t.Parallel()
	dev := openGPU(t)
	set, err := (&Compiler{Dir: t.TempDir(), InProcess: true}).Load(t.Context(), dev, Keys())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := set.Close(); err != nil {
			t.Error(err)
		}
	}()
	t.Logf("%s, %s: %+v", dev.Name(), dev.Arch(), set.Stats())
	const room = 8 << 20 // bytes of output
	host, err1 := dev.HostMalloc(4*room + 4096)
	mem, err2 := dev.Malloc(4*room + 4096) // and some for what is behind an output
	stream, err3 := dev.NewStream()
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(stream.Close(), mem.Close(), host.Close()); err != nil {
			t.Error(err)
		}
	}()
	generic, err := kernels.For(kernels.Generic)
	if err != nil {
		t.Fatal(err)
	}
	golden, compared := goldenBlocks(t), 0
	for _, k := range Keys() {
		random := rand.NewChaCha8([32]byte{byte(k.From), byte(k.To)})
		inputs := golden[k.From]
		for _, n := range []int{1, 2, 1000, room / int(k.outBytes())} {
			blocks := make([]byte, n*k.From.BlockBytes())
			_, _ = random.Read(blocks)
			inputs = append(slices.Clip(inputs), blocks)
		}
		for _, blocks := range inputs {
			n := uint64(len(blocks)) / k.inBytes()
			size := int(n * k.outBytes())
			copy(host.Bytes(), blocks)
			in, out := mem.Ptr()+256, mem.Ptr()+3*room
			err := errors.Join(
				stream.CopyToDevice(in, host, 0, len(blocks)), stream.Memset(out, 0xa5, uint64(size)+64),
				set.Launch(stream, k, out, in, n),
				stream.CopyToHost(host, 3*room, out, size+64), stream.Synchronize())
			if err != nil {
				t.Fatalf("%v: %v", k, err)
			}
			got, want := host.Bytes()[3*room:][:size+64], make([]byte, size)
			if err := generic.Dequantize(want, k.To, blocks, k.From); err != nil {
				t.Fatal(err)
			}
			if err := same(k, got[:size], want); err != nil {
				t.Error(err)
			}
			for _, b := range got[size:] {
				if b != 0xa5 {
					t.Errorf("%v wrote behind its output", k)
					break
				}
			}
			compared += size / k.To.BlockBytes()
		}
	}
	t.Logf("%d kernels, %d elements compared", len(Keys()), compared)
	if compared == 0 || !Supported(gguf.F16, gguf.Q4_K) {
		t.Error("nothing was compared")
	}
}
