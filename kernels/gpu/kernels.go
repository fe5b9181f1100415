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
	// Threads is the number of threads in each block of a launch. It is a multiple of both sizes of wavefronts, 32 and
	// 64.
	Threads = 256
	// Align is the alignment in bytes that the input and output of a kernel must have.
	Align = 16
	// Padding is how many bytes before and after its input a kernel may read.
	Padding = 16
)

// Key identifies a kernel by the types that it converts from and to. To is F32, F16 or BF16.
type Key struct {
	To, From gguf.Type
	// Fingerprint is the kernel of [Set.Fingerprint], which converts nothing: To and From are zero then.
	Fingerprint bool
}

// format says which HIP C++ file has a source type.
type format struct {
	file  string
	grids bool // the program must have the grids before the file
}

// formats has the types that kernels can convert from.
var formats = map[gguf.Type]format{
	gguf.F32: {file: "plain"}, gguf.F16: {file: "plain"}, gguf.BF16: {file: "plain"},
	gguf.Q4_0: {file: "legacy"}, gguf.Q4_1: {file: "legacy"}, gguf.Q5_0: {file: "legacy"}, gguf.Q5_1: {file: "legacy"},
	gguf.Q8_0: {file: "legacy"}, gguf.Q8_1: {file: "legacy"}, gguf.Q1_0: {file: "legacy"}, gguf.Q2_0: {file: "legacy"},
	gguf.Q2_K: {file: "kquant"}, gguf.Q3_K: {file: "kquant"}, gguf.Q4_K: {file: "kquant"}, gguf.Q5_K: {file: "kquant"},
	gguf.Q6_K: {file: "kquant"}, gguf.Q8_K: {file: "kquant"},
	gguf.IQ4_NL: {file: "lookup"}, gguf.IQ4_XS: {file: "lookup"},
	gguf.MXFP4: {file: "lookup"}, gguf.NVFP4: {file: "lookup"},
	gguf.TQ1_0: {file: "ternary"}, gguf.TQ2_0: {file: "ternary"},
	gguf.IQ1_S: {"iquant", true}, gguf.IQ1_M: {"iquant", true},
	gguf.IQ2_XXS: {"iquant", true}, gguf.IQ2_XS: {"iquant", true}, gguf.IQ2_S: {"iquant", true},
	gguf.IQ3_XXS: {"iquant", true}, gguf.IQ3_S: {"iquant", true},
}

//go:embed hip/*.hip
var sources embed.FS

// outputs are the types that kernels write.
var outputs = []gguf.Type{gguf.F32, gguf.F16, gguf.BF16}

// exists reports whether there is a kernel k.
func (k Key) exists() bool {
	if k.Fingerprint {
		return k == Key{Fingerprint: true}
	}
	return Supported(k.To, k.From)
}

// Supported reports whether there is a kernel that converts from one type to the other.
func Supported(to, from gguf.Type) bool {
	_, ok := formats[from]
	return ok && to != from && (to == gguf.F32 || to == gguf.F16 || to == gguf.BF16)
}

// Keys returns all kernels that convert, ordered by source type.
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

// Name returns the kernel's name, such as "dequantize_q4_k_f16" or "fingerprint".
func (k Key) Name() string {
	if k.Fingerprint {
		return "fingerprint"
	}
	return "dequantize_" + lower(k.From) + "_" + lower(k.To)
}

// String returns source and output, such as "Q4_K to F16", or "fingerprint".
func (k Key) String() string {
	if k.Fingerprint {
		return k.Name()
	}
	return fmt.Sprintf("%v to %v", k.From, k.To)
}

// lower returns the name of t in lower case, as HIP C++ has it.
func lower(t gguf.Type) string { return strings.ToLower(t.String()) }

// Source returns the HIP C++ program with this one kernel,
//
//	extern "C" __global__ void dequantize_...(T *out, const u8 *in, u64 blocks)
//
// whose addresses must be multiples of Align, and which may read Padding bytes before and after its input. For plain
// types blocks is the number of elements. That of fingerprints is
//
//	extern "C" __global__ void fingerprint(u64 *out, const u8 *in, u64 bytes, u64 at)
//
// where at, less than a block, is where in its block the input begins.
//
// A launch has one dimension: any number of blocks of Threads threads. Source panics if there is no such kernel.
func (k Key) Source() string {
	if !k.exists() {
		panic(fmt.Sprintf("gpu: there is no kernel %v", k))
	}
	return program([]Key{k})
}

// program returns a HIP C++ program with several kernels, which must be in one file.
func program(keys []Key) string {
	var b strings.Builder
	b.WriteString(source("common"))
	if keys[0].Fingerprint {
		fingerprintProgram(&b)
		return b.String()
	}
	f := formats[keys[0].From]
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
		fmt.Fprintf(&b, "void %s(%s *out, const u8 *in, u64 blocks) { %s<%s, %s>(out, in, blocks); }\n",
			k.Name(), to, call, from, to)
	}
	return b.String()
}

// source returns an embedded file, with a line that gives it a name for the compiler's messages.
func source(name string) string {
	text, err := sources.ReadFile("hip/" + name + ".hip")
	if err != nil {
		panic(err) // cannot be: formats names files that are embedded
	}
	return fmt.Sprintf("#line 1 \"%s.hip\"\n%s", name, text)
}

// grids returns the grids of the i-quants as constant arrays. Those of IQ2 and IQ3 have ggml's bytes. Both IQ1 types
// share one grid, with one word for 8 outputs: output + 1 of outputs 0 to 3 is in their byte from bit 3 on, that of
// outputs 4 to 7 from bit 5 on.
func grids() string {
	var b strings.Builder
	for _, t := range []gguf.Type{gguf.IQ2_XXS, gguf.IQ2_XS, gguf.IQ2_S, gguf.IQ3_XXS, gguf.IQ3_S} {
		var words []uint32
		for bytes := []byte(kernels.Grid(t)); len(bytes) > 0; bytes = bytes[4:] {
			words = append(words, binary.LittleEndian.Uint32(bytes))
		}
		array(&b, "u32", "grid_"+lower(t), words)
	}
	var words []uint32
	for bytes := kernels.Grid(gguf.IQ1_S); len(bytes) > 0; bytes = bytes[8:] {
		w := uint32(0)
		for i := range 4 {
			w |= uint32(bytes[i]+1)<<(8*i+3) | uint32(bytes[4+i]+1)<<(8*i+5)
		}
		words = append(words, w)
	}
	array(&b, "u32", "grid_iq1", words)
	return b.String()
}

// array writes a constant array of words. It is aligned so that a kernel can read two words at once.
func array[W uint32 | uint64](b *strings.Builder, typ, name string, words []W) {
	fmt.Fprintf(b, "alignas(8) static __device__ const %s %s[%d] = {", typ, name, len(words))
	for i, w := range words {
		if i%12 == 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(b, "%#x,", w)
	}
	b.WriteString("\n};\n")
}
