package plan

import (
	"errors"
	"fmt"
	"strings"

	"github.com/dustin/go-humanize"
)

// ErrInsufficientMemory is matched by the error of a plan that does not fit a device's free memory.
var ErrInsufficientMemory = errors.New("not enough device memory")

// MemoryError says what a plan needs on a device and what there is.
type MemoryError struct {
	Device  int    // number in the plan
	Name    string // the device's name; "" if it is not known
	Policy  Policy
	Needed  uint64   // bytes
	Free    uint64   // bytes
	Fitting []Policy // with which the same tensors would fit
}

// Error says what is needed, what is free, and which policy would fit.
func (e *MemoryError) Error() string {
	fit := "no dtype fits; load fewer tensors or use another device"
	if len(e.Fitting) > 0 {
		names := make([]string, len(e.Fitting))
		for i, p := range e.Fitting {
			names[i] = p.String()
		}
		fit = "it would fit as " + strings.Join(names, " or ")
	}
	name := e.Name
	if name == "" {
		name = fmt.Sprintf("device %d", e.Device)
	}
	return fmt.Sprintf("%v on %s: %s needs %s (%d bytes), free are %s (%d bytes); %s", ErrInsufficientMemory, name,
		e.Policy, humanize.IBytes(e.Needed), e.Needed, humanize.IBytes(e.Free), e.Free, fit)
}

// Unwrap makes the error match ErrInsufficientMemory.
func (e *MemoryError) Unwrap() error { return ErrInsufficientMemory }

// Fits compares what device d gets, and more bytes besides, with what is free there. The error is a *MemoryError.
func (p *Plan) Fits(d int, free, more uint64) error {
	g := p.GroupOf(d)
	if g.DeviceBytes+more <= free {
		return nil
	}
	e := &MemoryError{Device: d, Policy: p.Spec.Policy, Needed: g.DeviceBytes + more, Free: free}
	for _, other := range Policies() {
		if n, ok := g.bytesAs(p.Spec, other); ok && other != p.Spec.Policy && n <= free {
			e.Fitting = append(e.Fitting, other)
		}
	}
	return e
}

// bytesAs is how much memory the group's tensors would take with another policy; false if the sum overflows.
func (g *Group) bytesAs(s Spec, policy Policy) (total uint64, ok bool) {
	s.Policy = policy
	other := Group{Tensors: make([]Tensor, len(g.Tensors))}
	for i := range g.Tensors {
		t := &other.Tensors[i]
		*t = g.Tensors[i]
		t.Target = s.target(t.Name, t.Type)
		if t.Bytes, ok = t.bytes(); !ok {
			return 0, false
		}
	}
	if other.layOut() != nil {
		return 0, false
	}
	for _, n := range other.Arenas {
		if n > maxBytes-total {
			return 0, false
		}
		total += n
	}
	return total, true
}
