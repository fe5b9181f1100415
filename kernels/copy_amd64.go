//go:build !purego

package kernels

import (
	"unsafe"

	"github.com/klauspost/cpuid/v2"
)

// repCopy copies n bytes with the processor's string instruction.
//
//go:noescape
func repCopy(dst, src *byte, n int)

// minRepCopy is how many bytes are worth the instruction's start.
const minRepCopy = 4 << 10

// hasRepCopy is whether the instruction is said to be fast.
var hasRepCopy = cpuid.CPU.Supports(cpuid.ERMS)

func copyBytes(dst, src []byte) {
	if len(src) < minRepCopy || !hasRepCopy {
		copy(dst, src)
		return
	}
	for len(src) > 0 {
		n := min(len(src), maxCall)
		repCopy(unsafe.SliceData(dst), unsafe.SliceData(src), n)
		dst, src = dst[n:], src[n:]
	}
}
