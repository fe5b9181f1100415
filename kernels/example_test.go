package kernels_test

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

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
