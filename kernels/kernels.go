package kernels

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Errors that callers can tell apart with [errors.Is].
var (
	// ErrUnsupported: the CPU lacks a tier, or there is no conversion between two types. It is errors.ErrUnsupported.
	ErrUnsupported = errors.ErrUnsupported
	// ErrLength: the source is not whole blocks, or the destination has not exactly the size of their elements.
	ErrLength = errors.New("wrong length")
	// ErrOverlap: source and destination share memory.
	ErrOverlap = errors.New("source and destination overlap")
)

// maxCall bounds the source bytes of one assembly call. The scheduler cannot interrupt assembly, so a garbage
// collection, and with it every other goroutine, may have to wait for the end of a call.
const maxCall = 1 << 20

// output is the type of the elements that a kernel writes; it indexes the kernel tables.
type output uint8

const (
	outF32 output = iota
	outF16
	outBF16
	numOutputs
)

// outputOf returns the output that t names.
func outputOf(t gguf.Type) (output, bool) {
	switch t {
	case gguf.F32:
		return outF32, true
	case gguf.F16:
		return outF16, true
	case gguf.BF16:
		return outBF16, true
	}
	return 0, false
}

// Kernels is the set of conversions of one tier. The zero value is not usable; get one from [For].
type Kernels struct {
	isa ISA
	// fast has, for each pair of types, the kernel of the highest tier up to isa that has one. The generic code serves
	// the others.
	fast *kernelTable
}

// kernel is the assembly of one tier for one pair of types.
type kernel struct {
	// cached writes with ordinary stores, stream with non-temporal ones to a destination aligned to streamAlign.
	cached, stream kernelFunc
	// step is the number of source blocks that one iteration of the loop decodes: 1 for quantized types, and some
	// vectors of elements for plain types, whose blocks are single elements. The generic code decodes what is left at
	// the end.
	step int
	isa  ISA
}

// kernelFunc decodes steps·step blocks from src to dst.
type kernelFunc func(dst, src *byte, steps int)

// kernelTable is indexed by output and source type; an entry without functions is absent.
type kernelTable [numOutputs][gguf.NumTypes]kernel

// ISA returns the tier that For chose. It is never Auto.
func (k *Kernels) ISA() ISA { return k.isa }

// Tier returns the tier that serves a pair of types: that of k, or a lower one if that of k has no kernel for the pair.
// It is Auto for a pair that Dequantize refuses.
func (k *Kernels) Tier(to, from gguf.Type) ISA {
	out, ok := outputOf(to)
	if !ok || !from.Valid() {
		return Auto
	}
	return max(k.fast[out][from].isa, Generic)
}

// Dequantize decodes the blocks of type from in src to dst, as elements of type to, which is F32, F16 or BF16. Both are
// little-endian bytes and need no alignment. src must be whole blocks, dst must have exactly the size of their
// elements, and the two must not overlap; otherwise Dequantize writes nothing. Errors match ErrUnsupported, ErrLength
// or ErrOverlap.
func (k *Kernels) Dequantize(dst []byte, to gguf.Type, src []byte, from gguf.Type) error {
	return k.run(dst, to, src, from, false)
}

// DequantizeNT is Dequantize with non-temporal stores: the output goes to memory without staying in the caches. That is
// faster for a large dst that this core does not read again, such as a staging buffer that a device reads, and slower
// for a dst that fits the cache. It needs a dst aligned to 64 bytes and an assembly kernel for the pair of types;
// otherwise it does what Dequantize does. When it returns, the output is visible to other cores and to devices.
func (k *Kernels) DequantizeNT(dst []byte, to gguf.Type, src []byte, from gguf.Type) error {
	return k.run(dst, to, src, from, true)
}

// fillStep is the number of bytes that one iteration of a fill kernel writes.
const fillStep = 256

// FillNT sets every byte of dst to v, with non-temporal stores where DequantizeNT would use them. It reads nothing, so
// its rate is the upper bound for that of DequantizeNT.
func (k *Kernels) FillNT(dst []byte, v byte) {
	var pattern [streamAlign]byte
	for i := range pattern {
		pattern[i] = v
	}
	fill := fillKernel(k.isa)
	for fill != nil && isStreamable(dst) && len(dst) >= fillStep {
		steps := min(len(dst), maxCall) / fillStep
		writes(dst[:steps*fillStep])
		fill(unsafe.SliceData(dst), &pattern[0], steps)
		dst = dst[steps*fillStep:]
	}
	for n := 0; n < len(dst); {
		n += copy(dst[n:], pattern[:])
	}
}

// isStreamable reports whether dst has the alignment that non-temporal stores need.
func isStreamable(dst []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(dst)))%streamAlign == 0
}

// streamAlign is the alignment in bytes that non-temporal stores need: a cache line, which is also the widest vector.
const streamAlign = 64

// run is Dequantize, and with stream DequantizeNT.
func (k *Kernels) run(dst []byte, to gguf.Type, src []byte, from gguf.Type, stream bool) error {
	out, err := check(dst, to, src, from)
	if err != nil || len(src) == 0 {
		return err
	}
	fast := &k.fast[out][from]
	if fast.isa == Auto {
		generic(dst, out, src, from)
		return nil
	}
	f := fast.cached
	if stream && isStreamable(dst) {
		f = fast.stream
	}
	srcStep := fast.step * from.BlockBytes()
	dstStep := fast.step * from.BlockElems() * to.BlockBytes()
	for len(src) >= srcStep {
		steps := min(len(src), maxCall) / srcStep
		reads(src[:steps*srcStep])
		writes(dst[:steps*dstStep])
		f(unsafe.SliceData(dst), unsafe.SliceData(src), steps)
		dst, src = dst[steps*dstStep:], src[steps*srcStep:]
	}
	generic(dst, out, src, from)
	return nil
}

// check enforces what the kernels rely on, which check nothing themselves.
func check(dst []byte, to gguf.Type, src []byte, from gguf.Type) (output, error) {
	out, ok := outputOf(to)
	if !ok || !from.Valid() {
		return 0, fmt.Errorf("kernels: %v to %v: %w: only F32, F16 and BF16 can be written, from any type of a GGUF file",
			from, to, ErrUnsupported)
	}
	if len(src)%from.BlockBytes() != 0 {
		return 0, wholeBlocksError(len(src), from, to)
	}
	blocks := len(src) / from.BlockBytes()
	// Compared by division: the product may overflow an int of 32 bits.
	if perBlock := from.BlockElems() * to.BlockBytes(); len(dst)%perBlock != 0 || len(dst)/perBlock != blocks {
		return 0, fmt.Errorf("kernels: %v to %v: %w: destination has %d bytes, %d blocks decode to %d",
			from, to, ErrLength, len(dst), blocks, uint64(blocks)*uint64(perBlock))
	}
	if overlap(dst, src) {
		return 0, fmt.Errorf("kernels: %v to %v: %w", from, to, ErrOverlap)
	}
	return out, nil
}

// wholeBlocksError says that n bytes are not whole blocks of type from.
func wholeBlocksError(n int, from, to gguf.Type) error {
	return fmt.Errorf("kernels: %v to %v: %w: source has %d bytes, which is not a whole number of %d-byte blocks",
		from, to, ErrLength, n, from.BlockBytes())
}

// overlap reports whether a and b share a byte.
func overlap(a, b []byte) bool {
	if len(a) == 0 || len(b) == 0 {
		return false
	}
	aStart, bStart := uintptr(unsafe.Pointer(&a[0])), uintptr(unsafe.Pointer(&b[0]))
	return aStart < bStart+uintptr(len(b)) && bStart < aStart+uintptr(len(a))
}
