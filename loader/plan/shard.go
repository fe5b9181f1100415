package plan

import (
	"fmt"
	"regexp"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// ShardBy says how a model is divided among ranks.
type ShardBy uint8

// The ways to divide a model. ShardLayers gives every rank a run of whole layers, and so every tensor to one rank.
// ShardTensors gives every rank its slice of every large tensor, as tensor parallelism wants it.
const (
	ShardNone ShardBy = iota
	ShardLayers
	ShardTensors
)

var shardNames = []string{ShardNone: "none", ShardLayers: "layer", ShardTensors: "tensor"}

// String returns "none", "layer" or "tensor".
func (s ShardBy) String() string { return nameOf(s, shardNames, "shard") }

// MarshalText returns the name of the division.
func (s ShardBy) MarshalText() ([]byte, error) {
	return []byte(s.String()), checkName(s, shardNames, "shard")
}

// UnmarshalText sets the way to divide from its name.
func (s *ShardBy) UnmarshalText(text []byte) (err error) {
	*s, err = parseName[ShardBy](text, shardNames, "shard")
	return err
}

// Shard is the part of a model that one rank loads. The zero value is all of it.
//
// With ShardLayers, a layer is the tensors whose names have the same "blk.N." in them. Every rank gets a run of layers.
// The runs are as equal in device bytes as whole layers allow. Tensors that precede the layers go with the first run,
// those that follow with the last. Since bytes are what counts, all ranks must be given the same Policy, Rules and
// Tensors. With more ranks than layers, some ranks get nothing.
//
// With ShardTensors, a tensor's name says how it is divided: q, k and v of the attention, gate and up of the
// feed-forward, and their biases by rows; the attention's output and the feed-forward's down by columns; experts by
// expert; embedding and output by rows, which are the vocabulary. Every rank has the whole of all other tensors. Rows
// are divided between heads, and columns between quantization blocks. What does not divide evenly is refused, except
// the vocabulary: there the first ranks have one row more.
type Shard struct {
	Rank, World int // this rank, from 0 on, of so many; a World of 0 is 1
	By          ShardBy
	// Rules come before the built-in ones; the first that matches a tensor's name wins. With ShardLayers, Replicate is the
	// only division that makes sense.
	Rules []ShardRule
}

// Division says how a tensor is divided among ranks.
type Division uint8

// The divisions. Dimensions are those of ggml: the first is that of a row's elements.
const (
	Replicate     Division = iota // every rank has the whole tensor
	DivideRows                    // along the second dimension; the first of a tensor that has one, such as a bias
	DivideColumns                 // along the first dimension, by whole quantization blocks
	DivideExperts                 // along the last dimension
)

var divisionNames = []string{
	Replicate: "replicate", DivideRows: "rows", DivideColumns: "columns", DivideExperts: "experts",
}

// String returns "replicate", "rows", "columns" or "experts".
func (d Division) String() string { return nameOf(d, divisionNames, "division") }

// MarshalText returns the name of the division.
func (d Division) MarshalText() ([]byte, error) {
	return []byte(d.String()), checkName(d, divisionNames, "division")
}

// UnmarshalText sets the division from its name.
func (d *Division) UnmarshalText(text []byte) (err error) {
	*d, err = parseName[Division](text, divisionNames, "division")
	return err
}

// ShardRule says how the tensors whose names match are divided.
type ShardRule struct {
	Name *regexp.Regexp // matched anywhere in the tensor's name
	As   Division
}

// String returns the form that UnmarshalText reads.
func (r ShardRule) String() string { return ruleText(r.Name, r.As) }

// MarshalText returns the form 'REGEXP=DIVISION'.
func (r ShardRule) MarshalText() ([]byte, error) { return []byte(r.String()), r.check() }

// UnmarshalText reads the form 'REGEXP=rows', or columns, experts, replicate in place of rows; the last '=' divides.
func (r *ShardRule) UnmarshalText(text []byte) (err error) {
	r.Name, err = parseRule(text, "rows|columns|experts|replicate", r.As.UnmarshalText)
	return err
}

// check refuses a rule that nothing could match, and one with an unknown division.
func (r ShardRule) check() error {
	if r.Name == nil {
		return fmt.Errorf("%w: a shard rule for %v has no expression for names", ErrBadOption, r.As)
	}
	return checkName(r.As, divisionNames, "division")
}

// maxWorld bounds the number of ranks: more than any model has layers, heads or rows for.
const maxWorld = 1 << 16

// check fills the world of a zero value, and refuses what makes no sense.
func (s Shard) check() (Shard, error) {
	if s.World == 0 {
		s.World = 1
	}
	if err := checkName(s.By, shardNames, "shard"); err != nil {
		return s, err
	}
	for _, r := range s.Rules {
		if err := r.check(); err != nil {
			return s, err
		}
	}
	switch {
	case s.World < 0 || s.World > maxWorld:
		return s, fmt.Errorf("%w: a world of %d ranks: use 1 to %d", ErrBadOption, s.World, maxWorld)
	case s.Rank < 0 || s.Rank >= s.World:
		return s, fmt.Errorf("%w: rank %d of a world of %d: ranks are numbered from 0 to %d", ErrBadOption, s.Rank, s.World,
			s.World-1)
	case s.By == ShardNone && s.World > 1:
		return s, fmt.Errorf("%w: %d ranks, and nothing says how to divide the model among them: by layer or by tensor",
			ErrBadOption, s.World)
	}
	if s.By == ShardLayers {
		for _, r := range s.Rules {
			if r.As != Replicate {
				return s, fmt.Errorf("%w: shard rule %v: a shard of layers has whole tensors, so that only %v makes sense",
					ErrBadOption, r, Replicate)
			}
		}
	}
	return s, nil
}

// rule is the first of s.Rules for the tensor of that name.
func (s *Shard) rule(name string) (d Division, ok bool) {
	for _, r := range s.Rules {
		if r.Name.MatchString(name) {
			return r.As, true
		}
	}
	return 0, false
}

// share returns what this rank has of all, the selected tensors of m.
func (s *Shard) share(m *gguf.File, all []Tensor) ([]Tensor, error) {
	switch s.By {
	case ShardLayers:
		return s.layers(all)
	case ShardTensors:
		return s.slices(m, all)
	default:
		return all, nil
	}
}

// layers is the rank's share with ShardLayers.
func (s *Shard) layers(all []Tensor) ([]Tensor, error) {
	owners, err := assignLayers(all, slices.Repeat([]float64{1}, s.World))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadOption, err)
	}
	var mine []Tensor
	for i := range all {
		if _, replicated := s.rule(all[i].Name); replicated || owners[i] == s.Rank {
			mine = append(mine, all[i])
		}
	}
	return mine, nil
}
