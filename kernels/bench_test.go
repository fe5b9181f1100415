package kernels

import (
	"fmt"
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
