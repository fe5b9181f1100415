package main

import (
	. "github.com/mmcloughlin/avo/operand" //nolint:revive // The operands read as assembly does.
	"github.com/mmcloughlin/avo/reg"
)

// plainStep is the number of elements that kernels for plain types convert in one iteration.
const plainStep = 64

var plainFormats = []tensorFormat{
	{"F32", 4 * plainStep, plainStep, plainStep, 0, func(k *kernel) {
		k.convert(f32, 4, func(m Mem, x reg.VecVirtual) { k.VMOVUPS(m, x) })
	}},
	{"F16", 2 * plainStep, plainStep, plainStep, 0, func(k *kernel) {
		k.convert(f16, 2, func(m Mem, x reg.VecVirtual) { k.VCVTPH2PS(m, x) })
	}},
	{"BF16", 2 * plainStep, plainStep, plainStep, 0, func(k *kernel) {
		k.convert(bf16, 2, func(m Mem, x reg.VecVirtual) {
			k.VPMOVZXWD(m, x)
			k.VPSLLD(U8(16), x, x)
		})
	}},
}

// convert converts plainStep elements of size bytes each. widen emits the code that loads some of them as floats. If
// the elements have the output type already, they are copied.
func (k *kernel) convert(from output, size int, widen func(m Mem, x reg.VecVirtual)) {
	n := k.isa.lanes()
	if from == k.out {
		for offset := 0; offset < plainStep*size; offset += 4 * n {
			x := k.wide()
			k.VMOVUPS(k.at(offset), x)
			k.store(x, Mem{Base: k.dst, Disp: offset})
		}
		return
	}
	for first := 0; first < plainStep; first += 2 * n {
		var pair [2]reg.VecVirtual
		for i := range pair {
			pair[i] = k.wide()
			widen(k.at((first+i*n)*size), pair[i])
			k.quiet(pair[i])
		}
		k.writePair(first, pair)
	}
}

// fill is not a format: its kernels repeat the first 64 bytes of the source over the destination. They exist with
// non-temporal stores only.
var fill = tensorFormat{"Fill", 0, plainStep, plainStep, 0, func(k *kernel) {
	x := k.wide()
	k.VMOVUPS(k.at(0), x)
	for first := 0; first < plainStep; first += k.isa.lanes() {
		k.store(x, Mem{Base: k.dst, Disp: 4 * first})
	}
}}
