package gpu

import (
	"embed"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

const (
	// Threads is the number of threads of a block of every launch: whole wavefronts of 32 and of 64.
	Threads = 256
	// Align is what the addresses that a kernel is given must be multiples of, in bytes.
	Align = 16
	// Padding is how many bytes before and after its blocks a kernel may read.
	Padding = 16
)

// Key names a kernel: from a type of blocks to F32, F16 or BF16.
type Key struct{ To, From gguf.Type }

// format is where a source type is written in HIP C++.
type format struct {
	file  string
	grids bool // the file needs the grids before it
}

// formats are the types that there are kernels from.
var formats = map[gguf.Type]format{
	gguf.F32: {file: "plain"}, gguf.F16: {file: "plain"}, gguf.BF16: {file: "plain"},
	gguf.Q4_0: {file: "legacy"}, gguf.Q4_1: {file: "legacy"}, gguf.Q5_0: {file: "legacy"}, gguf.Q5_1: {file: "legacy"},
	gguf.Q8_0: {file: "legacy"}, gguf.Q8_1: {file: "legacy"}, gguf.Q1_0: {file: "legacy"}, gguf.Q2_0: {file: "legacy"},
	gguf.Q2_K: {file: "kquant"}, gguf.Q3_K: {file: "kquant"}, gguf.Q4_K: {file: "kquant"}, gguf.Q5_K: {file: "kquant"},
	gguf.Q6_K: {file: "kquant"}, gguf.Q8_K: {file: "kquant"},
	gguf.IQ4_NL: {file: "lookup"}, gguf.IQ4_XS: {file: "lookup"}, gguf.MXFP4: {file: "lookup"}, gguf.NVFP4: {file: "lookup"},
	gguf.TQ1_0: {file: "ternary"}, gguf.TQ2_0: {file: "ternary"},
	gguf.IQ1_S: {"iquant", true}, gguf.IQ1_M: {"iquant", true},
	gguf.IQ2_XXS: {"iquant", true}, gguf.IQ2_XS: {"iquant", true}, gguf.IQ2_S: {"iquant", true},
	gguf.IQ3_XXS: {"iquant", true}, gguf.IQ3_S: {"iquant", true},
}

//go:embed hip/*.hip
var sources embed.FS

// outputs are the types that kernels write.
var outputs = []gguf.Type{gguf.F32, gguf.F16, gguf.BF16}

// Supported reports whether there is a kernel for the conversion.
func Supported(to, from gguf.Type) bool {
	_, ok := formats[from]
	return ok && to != from && (to == gguf.F32 || to == gguf.F16 || to == gguf.BF16)
}

// Keys returns all kernels there are, by source type.
func Keys() []Key {
	var keys []Key
	for _, from := range gguf.Types() {
		for _, to := range outputs {
			if Supported(to, from) {
				keys = append(keys, Key{To: to, From: from})
			}
		}
	}
	return keys
}

// Name returns the kernel's name, such as "dequantize_q4_k_f16".
func (k Key) Name() string { return "dequantize_" + lower(k.From) + "_" + lower(k.To) }

// String returns source and output, such as "Q4_K to F16".
func (k Key) String() string { return fmt.Sprintf("%v to %v", k.From, k.To) }

func lower(t gguf.Type) string { return strings.ToLower(t.String()) }

// Source returns the program that has this one kernel,
//
//	extern "C" __global__ void dequantize_...(T *out, const u8 *in, u64 blocks)
//
// whose addresses are multiples of Align, and which may read Padding bytes on both sides of the blocks. For types that are no
// blocks, blocks counts elements. The grid has one dimension, of Threads threads a block and any number of blocks. Source
// panics for a kernel that is not Supported.
func (k Key) Source() string {
	if !Supported(k.To, k.From) {
		panic(fmt.Sprintf("gpu: there is no kernel %v", k))
	}
	return program([]Key{k})
}

// program is the text of a program with several kernels, which must be from types of one file.
func program(keys []Key) string {
	var b strings.Builder
	f := formats[keys[0].From]
	b.WriteString(source("common"))
	if f.grids {
		b.WriteString(grids())
	}
	b.WriteString(source(f.file))
	call := "dequantize"
	if f.file == "plain" {
		call = "convert"
	}
	for _, k := range keys {
		from, to := lower(k.From), lower(k.To)
		fmt.Fprintf(&b, "extern \"C\" __global__ __launch_bounds__(%d) ", Threads)
		fmt.Fprintf(&b, "void %s(%s *out, const u8 *in, u64 blocks) { %s<%s, %s>(out, in, blocks); }\n", k.Name(), to, call, from, to)
	}
	return b.String()
}

// source returns an embedded file, with the name that messages of compilers are to give it.
func source(name string) string {
	text, err := sources.ReadFile("hip/" + name + ".hip")
	if err != nil {
		panic(err) // the tests ask for every program
	}
	return fmt.Sprintf("#line 1 \"%s.hip\"\n%s", name, text)
}

// grids returns the grids of the i-quants as arrays. Those of IQ2 and IQ3 have ggml's bytes. Both IQ1 types share one, whose
// entries are words of 8 outputs increased by 1: 0 to 3 from bit 3 of their bytes on, 4 to 7 from bit 5 on.
func grids() string {
	var b strings.Builder
	for _, t := range []gguf.Type{gguf.IQ2_XXS, gguf.IQ2_XS, gguf.IQ2_S, gguf.IQ3_XXS, gguf.IQ3_S} {
		var words []uint32
		for bytes := []byte(kernels.Grid(t)); len(bytes) > 0; bytes = bytes[4:] {
			words = append(words, binary.LittleEndian.Uint32(bytes))
		}
		array(&b, "grid_"+lower(t), words)
	}
	var words []uint32
	for bytes := kernels.Grid(gguf.IQ1_S); len(bytes) > 0; bytes = bytes[8:] {
		w := uint32(0)
		for i := range 4 {
			w |= uint32(bytes[i]+1)<<(8*i+3) | uint32(bytes[4+i]+1)<<(8*i+5)
		}
		words = append(words, w)
	}
	array(&b, "grid_iq1", words)
	return b.String()
}

// array writes a constant array of words. Two words from an even one on can be read at once.
func array(b *strings.Builder, name string, words []uint32) {
	fmt.Fprintf(b, "alignas(8) static __device__ const u32 %s[%d] = {", name, len(words))
	for i, w := range words {
		if i%12 == 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(b, "%#x,", w)
	}
	b.WriteString("\n};\n")
}
