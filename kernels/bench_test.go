package kernels

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

const (
	// benchElems is the number of different elements that the benchmarks decode. With fewer, the branch predictor would
	// learn them.
	benchElems = 1 << 20
	// benchCall is the number of elements in one call: their output stays in the L2 cache.
	benchCall = 1 << 15
)

// benchBlocks returns random blocks without infinite scales.
func benchBlocks(from gguf.Type, elems int) []byte {
	src := randomBlocks(1, from, elems/from.BlockElems())
	for i := 1; i < len(src); i += 2 {
		src[i] &= 0xbf // clears the top bit of the exponent of every binary16 at an even offset
	}
	return src
}

// BenchmarkDequant decodes into an output that stays in the L2 cache from an input that does not repeat. MB/s is of the
// source; out-GB/s is of the output.
func BenchmarkDequant(b *testing.B) {
	for _, from := range gguf.Types() {
		src := benchBlocks(from, benchElems)
		for _, to := range outputs {
			for _, isa := range Supported() {
				k, err := For(isa)
				if err != nil {
					b.Fatal(err)
				}
				b.Run(fmt.Sprintf("type=%v/out=%v/isa=%v", from, to, isa), func(b *testing.B) {
					benchmark(b, k.Dequantize, to, src, from, benchCall)
				})
			}
		}
	}
}

// BenchmarkMemory decodes into an output of 512 MiB, more than a last-level cache holds, with ordinary and with
// non-temporal stores.
func BenchmarkMemory(b *testing.B) {
	const size = 512 << 20
	dst := aligned(size, 0)
	best, err := For(Auto)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("fill", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			best.FillNT(dst, 1)
		}
		report(b, size/4, gguf.F32)
	})
	for _, from := range gguf.Types() {
		for _, to := range outputs {
			elems := size / to.BlockBytes()
			src := make([]byte, elems/from.BlockElems()*from.BlockBytes())
			blocks := benchBlocks(from, benchElems)
			for n := 0; n < len(src); {
				n += copy(src[n:], blocks)
			}
			for _, stores := range []string{"cached", "NT"} {
				b.Run(fmt.Sprintf("type=%v/out=%v/stores=%s", from, to, stores), func(b *testing.B) {
					b.SetBytes(int64(len(src)))
					for b.Loop() {
						if err := modes[stores](best, dst, to, src, from); err != nil {
							b.Fatal(err)
						}
					}
					report(b, elems, to)
				})
			}
		}
	}
}

// benchmark decodes src again and again, call elements at a time, always to the same memory.
func benchmark(b *testing.B, run func([]byte, gguf.Type, []byte, gguf.Type) error, to gguf.Type, src []byte,
	from gguf.Type, call int,
) {
	dst := aligned(call*to.BlockBytes(), 0)
	step := call / from.BlockElems() * from.BlockBytes()
	b.SetBytes(int64(step))
	at := 0
	for b.Loop() {
		if err := run(dst, to, src[at:at+step], from); err != nil {
			b.Fatal(err)
		}
		if at += step; at == len(src) {
			at = 0
		}
	}
	report(b, call, to)
}

// report adds the rates of the output to the results.
func report(b *testing.B, elems int, to gguf.Type) {
	perSecond := float64(elems) * float64(b.N) / b.Elapsed().Seconds()
	b.ReportMetric(perSecond/1e9, "Gelem/s")
	b.ReportMetric(perSecond*float64(to.BlockBytes())/1e9, "out-GB/s")
}

// BenchmarkMemcpy copies 128 KiB in the L2 cache. BenchmarkDequant is compared with its rate.
func BenchmarkMemcpy(b *testing.B) {
	dst, src := aligned(4*benchCall, 0), aligned(4*benchCall, 0)
	b.SetBytes(int64(len(src)))
	for b.Loop() {
		copy(dst, src)
	}
	report(b, benchCall, gguf.F32)
}

// BenchmarkFingerprint computes fingerprints of bytes in the L2 cache, with each tier.
func BenchmarkFingerprint(b *testing.B) {
	src := aligned(4*FingerprintBlock, 0)
	sums := make([]uint64, 4)
	for _, isa := range Supported() {
		f := newFingerprinter(isa)
		b.Run(fmt.Sprintf("isa=%v", isa), func(b *testing.B) {
			b.SetBytes(int64(len(src)))
			for b.Loop() {
				f.add(sums, 0, src)
			}
		})
	}
}

// BenchmarkCopy copies from memory to memory, 4 MiB at a time, with and without fingerprints: with CopyAddFingerprint,
// to a dst that is not aligned, and in the way that CopyAddFingerprint has without assembly for copies. Run it with
// -cpu 1,2,... for several threads.
func BenchmarkCopy(b *testing.B) {
	const size, chunk = 256 << 20, 4 << 20
	src, dst := aligned(size, 0), aligned(size, 0)
	for i := range src {
		src[i], dst[i] = byte(i), 1 // so that the memory is there
	}
	best, err := For(Auto)
	if err != nil {
		b.Fatal(err)
	}
	pieces := newFingerprinter(best.ISA())
	pieces.kernel.copySum = nil
	for _, method := range []struct {
		name string
		copy func(dst, src []byte, sums []uint64)
	}{
		{"Copy", func(dst, src []byte, _ []uint64) { Copy(dst, src) }},
		{"CopyAddFingerprint", func(dst, src []byte, sums []uint64) { CopyAddFingerprint(dst, src, sums, 0) }},
		{"unaligned", func(dst, src []byte, sums []uint64) {
			CopyAddFingerprint(dst[1:], src[:chunk-1], sums, 0)
		}},
		{"pieces", func(dst, src []byte, sums []uint64) { pieces.copyAdd(dst, src, sums, 0) }},
	} {
		b.Run("method="+method.name, func(b *testing.B) {
			b.SetBytes(chunk)
			var next atomic.Int64
			b.RunParallel(func(pb *testing.PB) {
				sums := make([]uint64, Fingerprints(chunk))
				for pb.Next() {
					at := (next.Add(1) - 1) * chunk % size
					method.copy(dst[at:at+chunk], src[at:at+chunk], sums)
				}
			})
		})
	}
}
