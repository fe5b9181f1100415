package loader

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// DType is a policy for the element type that tensors get in device memory. The zero value is F16.
type DType uint8

// The policies. Those that name a type convert every quantized and every floating tensor to it; integer tensors are copied
// as they are by all of them.
const (
	F16  DType = iota // IEEE binary16
	F32               // IEEE binary32
	BF16              // bfloat16
	Raw               // the file's own bytes
)

var dtypeNames = [...]string{F16: "f16", F32: "f32", BF16: "bf16", Raw: "raw"}

// DTypes returns every policy, the one with the fewest bytes first as far as that is known without a model.
func DTypes() []DType { return []DType{Raw, F16, BF16, F32} }

// String returns the name that ParseDType takes: "f16", "f32", "bf16" or "raw".
func (d DType) String() string { return nameOf(d, dtypeNames[:], "dtype") }

// ParseDType returns the policy of that name; upper and lower case are the same.
func ParseDType(s string) (DType, error) {
	for d, name := range dtypeNames {
		if strings.EqualFold(s, name) {
			return DType(d), nil
		}
	}
	return 0, fmt.Errorf("unknown dtype %q: use raw, f32, f16 or bf16", s)
}

// Target returns the type that a tensor of type t has on the device.
func (d DType) Target(t gguf.Type) gguf.Type {
	if t.Integer() {
		return t
	}
	switch d {
	case F16:
		return gguf.F16
	case F32:
		return gguf.F32
	case BF16:
		return gguf.BF16
	default:
		return t
	}
}

// Rule is an exception to the dtype policy for the tensors whose names match.
type Rule struct {
	Name  *regexp.Regexp // matched anywhere in the tensor's name
	DType DType
}

// String returns the form that ParseRule reads.
func (r Rule) String() string { return fmt.Sprintf("%v=%v", r.Name, r.DType) }

// ParseRule reads the form 'REGEXP=DTYPE'; the last '=' divides.
func ParseRule(s string) (Rule, error) {
	name, d, err := parseRule(s, "DTYPE", ParseDType)
	return Rule{Name: name, DType: d}, err
}
