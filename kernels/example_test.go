package kernels_test

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// The tier is chosen once. A program that measures may ask for another one, if the CPU has it.
func ExampleFor() {
	best, err := kernels.For(kernels.Auto)
	if err != nil {
		fmt.Println(err) // GGUF2GPU_ISA names a tier that this CPU lacks, or no tier
		return
	}
	portable, err := kernels.For(kernels.Generic)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(best.ISA() >= portable.ISA(), portable.ISA(), portable.Tier(gguf.F16, gguf.Q4_K))
	// Output: true generic generic
}

// The second block of three has a scale of infinity.
func ExampleFirstNonFinite() {
	blocks := make([]byte, 3*gguf.Q8_0.BlockBytes())
	second := blocks[gguf.Q8_0.BlockBytes():]
	binary.LittleEndian.PutUint16(second, 0x7c00)
	second[2+5] = 1 // the code of its sixth element; the others are 0, and 0 times infinity is NaN
	elem, value, found, err := kernels.FirstNonFinite(blocks, gguf.Q8_0, gguf.F16)
	fmt.Println(elem, value, found, err)
	// Output: 32 NaN true <nil>
}

// The scales of a block say how large its elements can be.
func ExampleScales() {
	for _, s := range kernels.Scales(gguf.Q4_K) {
		fmt.Printf("at byte %d: a binary16 (%v), times %v at most\n", s.Offset, s.Format == kernels.ScaleF16, s.Factor)
	}
	// Output:
	// at byte 0: a binary16 (true), times 945 at most
	// at byte 2: a binary16 (true), times 63 at most
}

// One block of Q8_0 becomes 32 float32.
func ExampleKernels_Dequantize() {
	k, err := kernels.For(kernels.Auto)
	if err != nil {
		fmt.Println(err)
		return
	}
	// One block of Q8_0: the scale 0.5 as a binary16, then 32 signed codes.
	block := make([]byte, gguf.Q8_0.BlockBytes())
	binary.LittleEndian.PutUint16(block, 0x3800)
	for i := range 32 {
		block[2+i] = byte(i - 16)
	}
	dst := make([]byte, 32*4)
	if err := k.Dequantize(dst, gguf.F32, block, gguf.Q8_0); err != nil {
		fmt.Println(err)
		return
	}
	for _, i := range []int{0, 15, 31} {
		fmt.Println(math.Float32frombits(binary.LittleEndian.Uint32(dst[4*i:])))
	}
	// Output:
	// -8
	// -0.5
	// 7.5
}
