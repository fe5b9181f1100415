package gpu

import (
	"errors"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// TestFingerprintThroughSimulator runs the kernel's code on the CPU, thread by thread.
func TestFingerprintThroughSimulator(t *testing.T) {
	t.Parallel()
	dev := openSimulator(t)
	s := mustLoad(t, &Compiler{Dir: NoCache, InProcess: true}, dev, fingerprint)
	compareFingerprints(t, dev, s)
}

// TestFingerprintOnGPU runs the kernel on this machine's GPU.
func TestFingerprintOnGPU(t *testing.T) {
	t.Parallel()
	dev := openGPU(t)
	s := mustLoad(t, &Compiler{Dir: t.TempDir(), InProcess: true}, dev, fingerprint)
	compareFingerprints(t, dev, s)
}

// BenchmarkFingerprintOnGPU computes the fingerprints of 13.5 GB of device memory, or half of what is free, on this
// machine's GPU. The time is the device's.
func BenchmarkFingerprintOnGPU(b *testing.B) {
	dev := openGPU(b)
	s := mustLoad(b, &Compiler{Dir: b.TempDir(), InProcess: true}, dev, fingerprint)
	free, _, err := dev.MemInfo()
	if err != nil {
		b.Fatal(err)
	}
	size := min(13_500_000_000, free/2)
	stream, err1 := dev.NewStream()
	mem, err2 := dev.Malloc(size)
	sums, err3 := dev.Malloc(sumBytes * uint64(kernels.Fingerprints(int64(size))))
	before, err4 := dev.NewEvent(amdhip.EventOptions{Timing: true})
	after, err5 := dev.NewEvent(amdhip.EventOptions{Timing: true})
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		b.Fatal(err)
	}
	defer closed(b, stream, mem, sums, before, after)
	if err := stream.Memset(mem.Ptr(), 0x5a, size); err != nil {
		b.Fatal(err)
	}
	for _, off := range []int64{0, 2} {
		name := map[int64]string{0: "aligned", 2: "unaligned"}[off]
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(size) - off)
			var ms float64
			for b.Loop() {
				err := errors.Join(stream.Record(before),
					s.Fingerprint(stream, sums.Ptr(), mem.Ptr()+amdhip.DevicePtr(off), int64(size)-off),
					stream.Record(after), after.Synchronize())
				took, err2 := after.Elapsed(before)
				if err := errors.Join(err, err2); err != nil {
					b.Fatal(err)
				}
				ms += float64(took.Microseconds()) / 1e3
			}
			b.ReportMetric(ms/float64(b.N), "device-ms/op")
		})
	}
}
