package plan

import (
	"errors"
	"fmt"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Restrict makes t, which is a whole tensor, the slice of itself that has the given ranges of dimension dim, as they
// are in Slice.Dim and Slice.Ranges. It is for plans that another process made, see FromGroups: nothing of the ranges
// is trusted. Ranges that are the whole tensor leave t as it is.
func (t *Tensor) Restrict(dim int, ranges [][2]uint64) error {
	if t.Size <= 0 {
		return errors.New("a slice of a tensor without bytes")
	}
	if err := (&Slice{Dim: dim, Ranges: ranges, Shape: t.Shape}).check(t.Type); err != nil {
		return err
	}
	t.slice(dim, ranges)
	return nil
}

// check refuses what is no slice of a tensor of type t.
func (s *Slice) check(t gguf.Type) error {
	block := uint64(t.BlockElems())
	switch {
	case s.Dim < 0 || s.Dim >= len(s.Shape):
		return fmt.Errorf("a slice along dimension %d of %d", s.Dim, len(s.Shape))
	case block == 0 || s.Shape[0]%block != 0:
		return fmt.Errorf("rows of %d elements of %v cannot be divided", s.Shape[0], t)
	case len(s.Ranges) == 0:
		return errors.New("a slice without a range")
	}
	unit, end := uint64(1), uint64(0)
	if s.Dim == 0 {
		unit = block
	}
	for i, r := range s.Ranges {
		// Neighbours would be one range, and a slice has its ranges as few as can be.
		if r[0] >= r[1] || r[1] > s.Shape[s.Dim] || r[0] < end || i > 0 && r[0] == end || r[0]%unit != 0 || r[1]%unit != 0 {
			return fmt.Errorf("range %d to %d of a slice: ranges are in ascending order, of whole blocks, and end at %d at most",
				r[0], r[1], s.Shape[s.Dim])
		}
		end = r[1]
	}
	return nil
}

// part is the shape of the slice.
func (s *Slice) part() []uint64 {
	shape := slices.Clone(s.Shape)
	shape[s.Dim] = 0
	for _, r := range s.Ranges {
		shape[s.Dim] += r[1] - r[0]
	}
	return shape
}
