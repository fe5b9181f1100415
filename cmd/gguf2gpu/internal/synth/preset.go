package synth

import (
	"fmt"
	"strings"
)

// Preset is the architecture of a llama model. The zero value is of no use: take one of the variables, or set one by
// UnmarshalText.
type Preset struct {
	name    string
	context uint32 // tokens
	width   uint64 // embedding length
	layers  int
	ffn     uint64 // feed-forward length
	heads   uint64
	kvHeads uint64
	vocab   int // tokens
}

// The presets. Every row of every matrix is a multiple of 256 elements, the largest block, so that each type fits
// each matrix.
var (
	// Tiny has 1.4 million weights.
	Tiny = Preset{name: "tiny", context: 512, width: 256, layers: 2, ffn: 512, heads: 4, kvHeads: 2, vocab: 512}
	// Small has 25 million weights. It can be divided among four ranks by layers, rows, columns and heads, but its
	// vocabulary does not divide evenly.
	Small = Preset{name: "small", context: 512, width: 1024, layers: 4, ffn: 1024, heads: 16, kvHeads: 4, vocab: 1003}
	// Llama1B has the shape of TinyLlama 1.1B.
	Llama1B = Preset{
		name: "llama-1b", context: 2048, width: 2048, layers: 22, ffn: 5632, heads: 32, kvHeads: 4, vocab: 32000,
	}
	// Llama7B has the shape of Llama 2 7B.
	Llama7B = Preset{
		name: "llama-7b", context: 4096, width: 4096, layers: 32, ffn: 11008, heads: 32, kvHeads: 32, vocab: 32000,
	}
	// Llama70B has the shape of Llama 2 70B.
	Llama70B = Preset{
		name: "llama-70b", context: 4096, width: 8192, layers: 80, ffn: 28672, heads: 64, kvHeads: 8, vocab: 32000,
	}
)

// Presets returns all presets.
func Presets() []Preset { return []Preset{Tiny, Llama1B, Llama7B, Llama70B, Small} }

// PresetNames lists the names of all presets, with commas between them.
func PresetNames() string {
	var names []string
	for _, p := range Presets() {
		names = append(names, p.name)
	}
	return strings.Join(names, ", ")
}

// String returns the preset's name.
func (p Preset) String() string { return p.name }

// UnmarshalText sets p to the preset of that name. The error lists the names that are allowed.
func (p *Preset) UnmarshalText(text []byte) error {
	for _, known := range Presets() {
		if known.name == string(text) {
			*p = known
			return nil
		}
	}
	return fmt.Errorf("allowed are %s", PresetNames())
}
