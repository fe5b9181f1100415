package plan

import (
	"fmt"
	"regexp"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Policy says which element type tensors get in device memory. The zero value is F16.
type Policy uint8

// The policies. Those that name a type convert every quantized and every floating tensor to it. All of them leave
// integer tensors as they are.
const (
	F16  Policy = iota // IEEE binary16
	F32                // IEEE binary32
	BF16               // bfloat16
	Raw                // the file's own bytes
)

var policyNames = []string{F16: "f16", F32: "f32", BF16: "bf16", Raw: "raw"}

// Policies returns every policy, the one with the fewest bytes first as far as that is known without a model.
func Policies() []Policy { return []Policy{Raw, F16, BF16, F32} }

// String returns "f16", "f32", "bf16" or "raw".
func (p Policy) String() string { return nameOf(p, policyNames, "policy") }

// MarshalText returns the policy's name.
func (p Policy) MarshalText() ([]byte, error) {
	return []byte(p.String()), checkName(p, policyNames, "policy")
}

// UnmarshalText sets the policy from its name; upper and lower case are the same.
func (p *Policy) UnmarshalText(text []byte) (err error) {
	*p, err = parseName[Policy](text, policyNames, "dtype")
	return err
}

// Target returns the type that a tensor of type t gets on the device.
func (p Policy) Target(t gguf.Type) gguf.Type {
	if t.Integer() {
		return t
	}
	switch p {
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

// Rule is an exception to the policy, for the tensors whose names match.
type Rule struct {
	Name   *regexp.Regexp // matched anywhere in the tensor's name
	Policy Policy
}

// String returns the form that UnmarshalText reads.
func (r Rule) String() string { return ruleText(r.Name, r.Policy) }

// MarshalText returns the form 'REGEXP=POLICY'.
func (r Rule) MarshalText() ([]byte, error) { return []byte(r.String()), r.check() }

// UnmarshalText reads the form 'REGEXP=POLICY'; the last '=' divides.
func (r *Rule) UnmarshalText(text []byte) (err error) {
	r.Name, err = parseRule(text, "DTYPE", r.Policy.UnmarshalText)
	return err
}

// check refuses a rule that nothing could match, and one with an unknown policy.
func (r Rule) check() error {
	if r.Name == nil {
		return fmt.Errorf("%w: a rule for policy %v has no expression for names", ErrBadOption, r.Policy)
	}
	return checkName(r.Policy, policyNames, "policy")
}
