package synth

import (
	"fmt"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Types gives each matrix of a model its type. The zero value is of no use: take [Q4KM], or set one by UnmarshalText.
type Types struct {
	name string
	pick func(p Preset, layer int, name string) gguf.Type // layer is -1 for a matrix outside the layers
}

// Q4KM is the mix of types that llama.cpp calls Q4_K_M, in which most models are published.
var Q4KM = Types{"q4_k_m", pickQ4KM}

// String returns the name as UnmarshalText takes it.
func (t Types) String() string { return t.name }

// UnmarshalText sets t to the types of that name, in any case: q4_k_m for [Q4KM], or the name of a tensor type, which
// then is the type of all matrices. The error lists the names that are allowed; integer types are not, as they hold
// no weights.
func (t *Types) UnmarshalText(text []byte) error {
	name := strings.ToLower(string(text))
	if name == Q4KM.name {
		*t = Q4KM
		return nil
	}
	var typ gguf.Type
	err := typ.UnmarshalText([]byte(name))
	if err != nil || typ.Integer() {
		allowed := []string{Q4KM.name}
		for _, t := range gguf.Types() {
			if !t.Integer() {
				allowed = append(allowed, strings.ToLower(t.String()))
			}
		}
		return fmt.Errorf("allowed are %s; integer types hold no weights", strings.Join(allowed, ", "))
	}
	*t = Types{name, func(Preset, int, string) gguf.Type { return typ }}
	return nil
}

// pickQ4KM spends more bits where llama.cpp's Q4_K_M does: on the output, and on attn_v and ffn_down in the first and
// the last eighth of the layers and every third one between. The 70B model gives the rest of attn_v Q5_K, because it
// is small there: eight heads share it.
func pickQ4KM(p Preset, layer int, name string) gguf.Type {
	eighth := p.layers / 8
	important := layer < eighth || layer >= 7*p.layers/8 || (layer-eighth)%3 == 2
	switch {
	case name == "output":
		return gguf.Q6_K
	case (name == "attn_v" || name == "ffn_down") && important:
		return gguf.Q6_K
	case name == "attn_v" && p.name == "llama-70b":
		return gguf.Q5_K
	}
	return gguf.Q4_K
}
