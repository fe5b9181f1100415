package main

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/mmcloughlin/avo/attr"
	"github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
	"github.com/mmcloughlin/avo/reg"
)

// isa is an instruction set; it decides the width of the float vectors.
type isa int

const (
	avx2 isa = iota
	avx512
)

func (w isa) String() string { return [...]string{"AVX2", "AVX512"}[w] }

// lanes is the number of float32 in a vector.
func (w isa) lanes() int { return [...]int{8, 16}[w] }

// output is the type of the elements that a kernel writes.
type output int

const (
	f32 output = iota
	f16
	bf16
)

func (o output) String() string { return [...]string{"F32", "F16", "BF16"}[o] }

// size is the bytes of an element.
func (o output) size() int { return [...]int{4, 2, 2}[o] }

// tensorFormat describes a source type.
type tensorFormat struct {
	name string
	// One iteration of the loop decodes bytes of the source to elems outputs: step blocks.
	bytes, elems, step int
	// scratch is the number of bytes on the stack that decode uses through spill.
	scratch int
	// decode emits the code of one iteration. That reads exactly bytes from the source and writes elems outputs.
	decode func(k *kernel)
}

// file is one .s file under construction.
type file struct {
	*build.Context
	constants map[string]Mem // the key is their bytes
}

// kernel is one function under construction: for a format, an instruction set, an output type and a kind of stores.
type kernel struct {
	*file
	format tensorFormat
	isa    isa
	out    output
	nt     bool

	dst, src reg.GPVirtual
	// scratch points to the format's scratch memory on the stack. It is aligned to a cache line, so that the CPU can
	// forward a wide store to narrower loads that follow soon.
	scratch reg.GPVirtual
	round   roundConstants
}

// name is the function's name: avx2Q4_KToF16NT.
func (k *kernel) name() string {
	name := strings.ToLower(k.isa.String()) + k.format.name + "To" + k.out.String()
	if k.nt {
		name += "NT"
	}
	return name
}

func (k *kernel) routine() routine {
	return routine{
		ISA: k.isa.String(), Out: k.out.String(), From: k.format.name,
		Name: k.name(), Step: k.format.step, NT: k.nt,
	}
}

// build emits the function: a loop around the format's decoder.
func (k *kernel) build(f *file) {
	k.file = f
	k.Function(k.name())
	k.SignatureExpr("func(dst, src *byte, steps int)")
	k.Attributes(attr.NOSPLIT)
	k.dst = k.Load(k.Param("dst"), k.GP64()).(reg.GPVirtual)
	k.src = k.Load(k.Param("src"), k.GP64()).(reg.GPVirtual)
	steps := k.Load(k.Param("steps"), k.GP64())
	k.loadRoundConstants()
	if k.format.scratch > 0 {
		k.scratch = k.GP64()
		k.LEAQ(k.AllocLocal(k.format.scratch+64), k.scratch)
		k.ADDQ(I8(63), k.scratch)
		k.ANDQ(I8(-64), k.scratch)
	}
	k.Label("loop")
	k.prefetch()
	k.format.decode(k)
	if k.format.bytes > 0 {
		k.ADDQ(I32(k.format.bytes), k.src)
	}
	k.ADDQ(I32(k.format.elems*k.out.size()), k.dst)
	k.DECQ(steps)
	k.JNZ(LabelRef("loop"))
	if k.nt {
		k.Comment("Non-temporal stores are weakly ordered.")
		k.SFENCE()
	}
	k.VZEROUPPER()
	k.RET()
}

// prefetchAhead is how many bytes ahead kernels with non-temporal stores prefetch their source: one page, as the
// hardware does not prefetch across the end of a page.
const prefetchAhead = 4096

// prefetch prefetches source bytes for a later iteration. Beyond the end of the source that has no effect.
func (k *kernel) prefetch() {
	if !k.nt {
		return
	}
	for offset := 0; offset < k.format.bytes; offset += 64 {
		k.PREFETCHT0(k.at(prefetchAhead + offset))
	}
}

// at returns the operand for the source at an offset in the block.
func (k *kernel) at(offset int) Mem { return Mem{Base: k.src, Disp: offset} }

// wide returns a fresh vector of floats.
func (k *kernel) wide() reg.VecVirtual {
	if k.isa == avx512 {
		return k.ZMM()
	}
	return k.YMM()
}

// halfWide returns a fresh vector of half that width.
func (k *kernel) halfWide() reg.VecVirtual {
	if k.isa == avx512 {
		return k.YMM()
	}
	return k.XMM()
}

// data returns 32 constant bytes, the pattern repeated.
func (k *kernel) data(pattern ...byte) Mem {
	b := make([]byte, 32)
	for i := range b {
		b[i] = pattern[i%len(pattern)]
	}
	return k.global(string(b))
}

// dwords is data for 32-bit words.
func (k *kernel) dwords(words ...uint32) Mem {
	var b []byte
	for _, w := range words {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	return k.data(b...)
}

// words is data for 16-bit words.
func (k *kernel) words(words ...uint16) Mem {
	var b []byte
	for _, w := range words {
		b = binary.LittleEndian.AppendUint16(b, w)
	}
	return k.data(b...)
}

// dwordsWide is dwords with the width of the float vectors.
func (k *kernel) dwordsWide(words ...uint32) Mem {
	var b []byte
	for i := range k.isa.lanes() {
		b = binary.LittleEndian.AppendUint32(b, words[i%len(words)])
	}
	return k.global(string(b))
}

// global returns the constant with the bytes b. It adds it to the file if it is not there yet.
func (k *kernel) global(b string) Mem {
	if m, ok := k.constants[b]; ok {
		return m
	}
	m := k.StaticGlobal(fmt.Sprintf("const%d", len(k.constants)))
	k.DataAttributes(attr.RODATA | attr.NOPTR)
	for i := 0; i < len(b); i += 8 {
		k.AddDatum(i, U64(binary.LittleEndian.Uint64([]byte(b[i:i+8]))))
	}
	k.constants[b] = m
	return m
}

// goVar returns the operand for a variable of package kernels.
func goVar(name string) Mem { return Mem{Symbol: Symbol{Name: "·" + name}, Base: reg.StaticBase} }

// load loads 32 bytes into a register.
func (k *kernel) load(m Mem) reg.VecVirtual {
	y := k.YMM()
	k.VMOVDQU(m, y)
	return y
}

// spill stores 32 bytes at a scratch offset.
func (k *kernel) spill(y reg.Register, offset int) { k.VMOVDQU(y, k.spilled(offset)) }

// spilled returns the operand for the scratch memory at an offset.
func (k *kernel) spilled(offset int) Mem { return Mem{Base: k.scratch, Disp: offset} }
