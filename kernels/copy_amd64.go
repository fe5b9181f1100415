//go:build !purego

package kernels

import (
	"unsafe"

	"github.com/klauspost/cpuid/v2"
)

// repCopy copies n bytes with the processor's string instruction. Callers report what it reads and writes to the race
// detector.
//
//go:noescape
func repCopy(dst, src *byte, n int)

// minRepCopy is the least number of bytes for which repCopy is used: the instruction takes some time to start.
const minRepCopy = 4 << 10

// hasRepCopy says whether the CPU reports that the instruction is fast (Enhanced REP MOVSB).
var hasRepCopy = cpuid.CPU.Supports(cpuid.ERMS)

// copyBytes copies src to dst, which has the same length.
func copyBytes(dst, src []byte) {
	if len(src) < minRepCopy || !hasRepCopy {
		copy(dst, src)
		return
	}
	for len(src) > 0 {
		n := min(len(src), maxCall)
		reads(src[:n])
		writes(dst[:n])
		repCopy(unsafe.SliceData(dst), unsafe.SliceData(src), n)
		dst, src = dst[n:], src[n:]
	}
}
