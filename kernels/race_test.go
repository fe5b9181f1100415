//go:build race

package kernels

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// raceEnv names the race that a child process of TestRaceDetectorSeesKernels runs.
const raceEnv = "KERNELS_TEST_RACE"

// races call a kernel with dst and src. Meanwhile another goroutine writes to the one that is in the name.
var races = []struct {
	name string
	call func(k *Kernels, dst, src []byte) error
}{
	{"Dequantize src", func(k *Kernels, dst, src []byte) error { return k.Dequantize(dst, gguf.F32, src, gguf.F16) }},
	{"Dequantize dst", func(k *Kernels, dst, src []byte) error { return k.Dequantize(dst, gguf.F32, src, gguf.F16) }},
	{"DequantizeNT src", func(k *Kernels, dst, src []byte) error { return k.DequantizeNT(dst, gguf.F32, src, gguf.F16) }},
	{"DequantizeNT dst", func(k *Kernels, dst, src []byte) error { return k.DequantizeNT(dst, gguf.F32, src, gguf.F16) }},
	{"FillNT dst", func(k *Kernels, dst, _ []byte) error { k.FillNT(dst, 1); return nil }},
	{"Copy src", func(_ *Kernels, dst, src []byte) error { Copy(dst, src); return nil }},
	{"Copy dst", func(_ *Kernels, dst, src []byte) error { Copy(dst[:len(src)], src); return nil }},
	{"Fingerprint src", func(_ *Kernels, _, src []byte) error { Fingerprint(make([]uint64, 1), src); return nil }},
	{"CopyAddFingerprint src", copyFingerprint},
	{"CopyAddFingerprint dst", copyFingerprint},
}

func copyFingerprint(_ *Kernels, dst, src []byte) error {
	CopyAddFingerprint(dst[:len(src)], src, make([]uint64, 1), 0)
	return nil
}

// TestRaceDetectorSeesKernels runs each race in a process of its own, which the race detector must end. It exists only
// with -race: "make race" runs it. It is about assembly: what compiled Go reads and writes the race detector knows by
// itself.
func TestRaceDetectorSeesKernels(t *testing.T) {
	t.Parallel()
	if name := os.Getenv(raceEnv); name != "" {
		race(t, name)
		return
	}
	if k, err := For(Auto); err != nil || k.ISA() == Generic {
		t.Skipf("there is no assembly for this CPU, or in this build (%v)", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range races {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(self, "-test.run=^TestRaceDetectorSeesKernels$")
			cmd.Env = append(os.Environ(), raceEnv+"="+r.name, "GORACE=exitcode=66 halt_on_error=1")
			out, _ := cmd.CombinedOutput()
			if code := cmd.ProcessState.ExitCode(); code != 66 || !bytes.Contains(out, []byte("DATA RACE")) {
				t.Errorf("exit code %d, want 66 for a race:\n%s", code, out)
			}
		})
	}
}

// race runs one of the races.
func race(t *testing.T, name string) {
	k, err := For(Auto)
	if err != nil {
		t.Fatal(err)
	}
	const (
		// Whole iterations of the loop of every kernel, so that nothing is left for the generic code; and enough bytes
		// for Copy to use assembly.
		elems = 2048
		// One race may be missed: the detector forgets where an access was when many others follow.
		times = 1000
	)
	src, dst := make([]byte, 2*elems), aligned(4*elems, 0)
	for _, r := range races {
		if r.name != name {
			continue
		}
		shared := src
		if strings.HasSuffix(name, "dst") {
			shared = dst[:len(src)]
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range times {
				shared[len(shared)-1] = 1
			}
		}()
		for range times {
			if err := r.call(k, dst, src); err != nil {
				t.Fatal(err)
			}
		}
		<-done
	}
}
