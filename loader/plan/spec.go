package plan

import (
	"fmt"
	"regexp"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Spec says what is wanted of a model. The zero value is all tensors as F16, on one device or by layers on several.
type Spec struct {
	Policy  Policy         // what tensors are converted to
	Rules   []Rule         // exceptions by tensor name; the first that matches wins
	Tensors *regexp.Regexp // only the tensors whose names match; nil: all
	Shard   Shard          // the share of one of several ranks; the zero value is everything
	Split   Split          // how the share is spread over the devices of the process
}

// SplitBy says how a model is spread over several devices of one process.
type SplitBy uint8

// The ways to spread a model: whole layers on each device, or a full copy on each.
const (
	SplitLayers SplitBy = iota
	SplitNone
)

var splitNames = []string{SplitLayers: "layer", SplitNone: "none"}

// String returns "layer" or "none".
func (s SplitBy) String() string { return nameOf(s, splitNames, "split") }

// MarshalText returns the name of the split.
func (s SplitBy) MarshalText() ([]byte, error) {
	return []byte(s.String()), checkName(s, splitNames, "split")
}

// UnmarshalText sets the split from its name.
func (s *SplitBy) UnmarshalText(text []byte) (err error) {
	*s, err = parseName[SplitBy](text, splitNames, "split")
	return err
}

// Split says how a model is spread over devices. The zero value is by layers, in proportion to free memory.
type Split struct {
	By    SplitBy
	Ratio []float64 // with SplitLayers the devices' shares, of which 0 is nothing at all; nil: by free memory
}

// check refuses a split that n devices cannot have.
func (s Split) check(n int) error {
	if err := checkName(s.By, splitNames, "split"); err != nil {
		return err
	}
	switch {
	case s.Ratio == nil:
	case s.By == SplitNone:
		return fmt.Errorf("%w: a ratio is for a split by layers: with full copies there is nothing to share", ErrBadOption)
	case len(s.Ratio) != n:
		return fmt.Errorf("%w: a ratio of %d numbers for %d devices", ErrBadOption, len(s.Ratio), n)
	}
	for _, r := range s.Ratio {
		if r != 0 && !(r > 0 && r <= 1e9 && r >= 1e-9) { // NaN is refused, too
			return fmt.Errorf("%w: a share of %v: use numbers above 0, such as 3,1, or 0 for a device that gets nothing", ErrBadOption, r)
		}
	}
	if s.Ratio != nil && len(s.Among(n)) == 0 {
		return fmt.Errorf("%w: no device has a share above 0", ErrBadOption)
	}
	return nil
}

// Among returns which of n devices may get something: all but those whose share is 0.
func (s Split) Among(n int) []int {
	all := make([]int, 0, n)
	for i := range n {
		if s.Ratio == nil || s.Ratio[i] != 0 {
			all = append(all, i)
		}
	}
	return all
}

// check returns a copy of s that shares no list with it, with what is left open filled. It refuses what makes no sense
// on n devices.
func (s Spec) check(n int) (Spec, error) {
	if n < 1 {
		return s, fmt.Errorf("%w: no devices", ErrBadOption)
	}
	if err := checkName(s.Policy, policyNames, "policy"); err != nil {
		return s, err
	}
	for _, r := range s.Rules {
		if err := r.check(); err != nil {
			return s, err
		}
	}
	if err := s.Split.check(n); err != nil {
		return s, err
	}
	var err error
	s.Shard, err = s.Shard.check()
	s.Rules, s.Split.Ratio, s.Shard.Rules = slices.Clone(s.Rules), slices.Clone(s.Split.Ratio), slices.Clone(s.Shard.Rules)
	return s, err
}

// target is the type on the device of a tensor of that name and type.
func (s *Spec) target(name string, t gguf.Type) gguf.Type {
	for _, r := range s.Rules {
		if r.Name.MatchString(name) {
			return r.Policy.Target(t)
		}
	}
	return s.Policy.Target(t)
}
