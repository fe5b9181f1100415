package loader

import (
	"fmt"
	"regexp"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// ShardBy says how a model is divided among ranks.
type ShardBy uint8

// The ways to divide a model. ShardLayers gives every rank a run of whole layers, and so every tensor to one rank. ShardTensors
// gives every rank its slice of every large tensor, as tensor parallelism wants it.
const (
	ShardNone ShardBy = iota
	ShardLayers
	ShardTensors
)

var shardNames = [...]string{ShardNone: "none", ShardLayers: "layer", ShardTensors: "tensor"}

// String returns the name that ParseShardBy takes.
func (s ShardBy) String() string { return nameOf(s, shardNames[:], "shard") }

// ParseShardBy returns the way of that name: "none", "layer" or "tensor".
func ParseShardBy(s string) (ShardBy, error) {
	return parseName[ShardBy](s, shardNames[:], "way to shard")
}

// Shard is the part of a model that one rank loads. The zero value is all of it.
//
// With ShardLayers, layers are the tensors whose names have the same "blk.N." in them. Ranks get runs of them that are as equal in
// device bytes as whole layers allow, what precedes the layers goes with the first and what follows them with the last. Since
// bytes are what counts, all ranks must be given the same DType, Rules and Tensors.
//
// With ShardTensors, attention's q, k and v and the feed-forward's gate and up are divided by rows, their biases likewise, the
// attention's output and the feed-forward's down by columns, experts by expert, and embedding and output by rows, the vocabulary,
// of which the first ranks have one more where it does not divide evenly. What else there is, each rank has whole. Rows are
// divided between heads, and columns between quantization blocks; what does not divide evenly is refused.
type Shard struct {
	Rank, World int // this rank, from 0 on, of so many; a World of 0 is 1
	By          ShardBy
	Rules       []ShardRule // by tensor name, before the built-in ones; the first that matches wins. ShardLayers knows Replicate only
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

var divisionNames = [...]string{Replicate: "replicate", DivideRows: "rows", DivideColumns: "columns", DivideExperts: "experts"}

// String returns the name that ParseShardRule takes.
func (d Division) String() string { return nameOf(d, divisionNames[:], "division") }

// ShardRule says how the tensors whose names match are divided.
type ShardRule struct {
	Name *regexp.Regexp // matched anywhere in the tensor's name
	As   Division
}

// String returns the form that ParseShardRule reads.
func (r ShardRule) String() string { return fmt.Sprintf("%v=%v", r.Name, r.As) }

// ParseShardRule reads the form 'REGEXP=rows', or columns, experts, replicate in place of rows; the last '=' divides.
func ParseShardRule(s string) (ShardRule, error) {
	name, as, err := parseRule(s, "rows|columns|experts|replicate", func(s string) (Division, error) {
		return parseName[Division](s, divisionNames[:], "division")
	})
	return ShardRule{Name: name, As: as}, err
}

// maxWorld bounds the number of ranks: more than any model has layers, heads or rows for.
const maxWorld = 1 << 16

// withDefaults refuses what makes no sense.
func (s Shard) withDefaults() (Shard, error) {
	if s.World == 0 {
		s.World = 1
	}
	switch {
	case s.World < 0 || s.World > maxWorld:
		return s, fmt.Errorf("%w: a world of %d ranks: use 1 to %d", ErrBadOption, s.World, maxWorld)
	case s.Rank < 0 || s.Rank >= s.World:
		return s, fmt.Errorf("%w: rank %d of a world of %d: ranks are numbered from 0 to %d", ErrBadOption, s.Rank, s.World, s.World-1)
	case int(s.By) >= len(shardNames):
		return s, fmt.Errorf("%w: %v: use ShardNone, ShardLayers or ShardTensors", ErrBadOption, s.By)
	case s.By == ShardNone && s.World > 1:
		return s, fmt.Errorf("%w: %d ranks, and nothing says how to divide the model among them: by layer or by tensor", ErrBadOption, s.World)
	}
	if s.By == ShardLayers {
		for _, r := range s.Rules {
			if r.As != Replicate {
				return s, fmt.Errorf("%w: shard rule %v: a shard of layers has whole tensors, so that only %v makes sense", ErrBadOption, r, Replicate)
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

// share is what this rank has of the tensors all of m.
func (s *Shard) share(m *gguf.Model, all []PlannedTensor) ([]PlannedTensor, error) {
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
func (s *Shard) layers(all []PlannedTensor) ([]PlannedTensor, error) {
	owners, err := assignLayers(all, slices.Repeat([]float64{1}, s.World))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBadOption, err)
	}
	var mine []PlannedTensor
	for i := range all {
		if _, replicated := s.rule(all[i].Name); replicated || owners[i] == s.Rank {
			mine = append(mine, all[i])
		}
	}
	return mine, nil
}
