package amdhip

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"runtime"
	"unsafe"
)

// LaunchConfig is the shape of a launch.
type LaunchConfig struct {
	Grid  Dim3 // in blocks; 0 stands for 1 in every direction
	Block Dim3 // in threads; 0 stands for 1 in every direction
	// SharedBytes is how much dynamic shared memory each block gets: that of extern __shared__ arrays.
	SharedBytes uint32
}

// filled replaces zeros by ones.
func (d Dim3) filled() Dim3 { return Dim3{max(d.X, 1), max(d.Y, 1), max(d.Z, 1)} }

// Launch starts f on blocks·threads threads, as a grid of one dimension, and returns; the threads must be fewer than
// 2^32 in all. Every parameter of the kernel must have 8 bytes: args are their values, which are copied. It is the
// quick way for such kernels; LaunchKernel is for all others. HIP does not know how many parameters a kernel has and
// reads what is not there; the software device refuses a wrong number of args. Memory that the kernel works on must
// stay allocated until it is done. Stream and module must belong to one device, else the error matches
// ErrInvalidHandle.
func (s *Stream) Launch(f *Function, blocks, threads uint32, args ...uint64) error {
	// HIP reads the values through these pointers during the call, so they are pinned for as long.
	var pins runtime.Pinner
	defer pins.Unpin()
	params := make([]unsafe.Pointer, len(args)+1)
	for i := range args {
		params[i] = unsafe.Pointer(&args[i])
	}
	if len(args) > 0 {
		pins.Pin(&args[0])
	}
	return s.launch(f, Dim3{blocks, 1, 1}, Dim3{threads, 1, 1}, 0, params)
}

// LaunchKernel starts f on a grid of blocks and returns. args are the values of the kernel's parameters in their order.
// Each must have the size and the layout of its parameter: numbers of Go with a fixed size, bool, DevicePtr and uintptr
// for pointers to device memory, and arrays and structs of those, which Go lays out as C does. int and uint, whose size
// C does not share, and whatever has a pointer of Go in it are refused with ErrInvalidValue. What is said of Launch
// holds here, too.
func (s *Stream) LaunchKernel(f *Function, c LaunchConfig, args ...any) error {
	size := uintptr(0)
	for i, arg := range args {
		t := reflect.TypeOf(arg)
		if t == nil || !plainData(t) {
			return fmt.Errorf("amdhip: launch of %s: argument %d is %T, which has no fixed layout in C: %w",
				f.name, i, arg, ErrInvalidValue)
		}
		size += cellSize(t)
	}
	cells := make([]uint64, size/8+1)
	var pins runtime.Pinner
	defer pins.Unpin()
	pins.Pin(&cells[0])
	params := make([]unsafe.Pointer, len(args)+1)
	next := unsafe.Pointer(&cells[0])
	for i, arg := range args {
		v := reflect.ValueOf(arg)
		reflect.NewAt(v.Type(), next).Elem().Set(v)
		params[i] = next
		next = unsafe.Add(next, cellSize(v.Type()))
	}
	return s.launch(f, c.Grid.filled(), c.Block.filled(), c.SharedBytes, params)
}

// cellSize is how many bytes an argument gets: whole words, so that a kernel whose parameter is somewhat larger reads
// zeros.
func cellSize(t reflect.Type) uintptr { return (t.Size() + 7) / 8 * 8 }

// plainData reports whether values of the type have a size and a layout that C shares.
func plainData(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Bool, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64, reflect.Uint8, reflect.Uint16,
		reflect.Uint32,
		reflect.Uint64, reflect.Uintptr, reflect.Float32, reflect.Float64:
		return true
	case reflect.Array:
		return t.Len() > 0 && plainData(t.Elem())
	case reflect.Struct:
		for field := range t.Fields() {
			if !plainData(field.Type) {
				return false
			}
		}
		return t.NumField() > 0
	}
	return false
}

// launch makes the call. params ends with a nil, for the software device.
func (s *Stream) launch(f *Function, grid, block Dim3, shared uint32, params []unsafe.Pointer) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	m := f.module
	if err := m.enter(); err != nil {
		return err
	}
	defer m.leave()
	if err := s.sameRuntime(&m.handle); err != nil {
		return err
	}
	rt := s.dev.rt
	if s.dev != m.dev {
		return rt.fail("hipModuleLaunchKernel", ErrInvalidHandle, "not called: %s of %s, %s", f.name, m.what, s.what)
	}
	for _, n := range [][2]uint32{{grid.X, block.X}, {grid.Y, block.Y}, {grid.Z, block.Z}} {
		if threads := uint64(n[0]) * uint64(n[1]); threads == 0 || threads > math.MaxUint32 {
			return rt.fail("hipModuleLaunchKernel", ErrInvalidValue, "not called: %s with %s", f.name, shape(grid, block))
		}
	}
	err := s.dev.onThread("hipModuleLaunchKernel", "", func() Status {
		return rt.api.HipModuleLaunchKernel(f.raw, grid.X, grid.Y, grid.Z, block.X, block.Y, block.Z, shared, s.raw,
			&params[0], nil)
	})
	if e, ok := errors.AsType[*Error](err); ok { // put together here only: launches are on the hot path
		e.Detail = fmt.Sprintf("%s with %s, %s", f.name, shape(grid, block), e.Detail)
	}
	return err
}

// shape describes a launch: "3 blocks of 64 threads", "3×2×1 blocks of 8×8×1 threads".
func shape(grid, block Dim3) string {
	if grid.Y == 1 && grid.Z == 1 && block.Y == 1 && block.Z == 1 {
		return fmt.Sprintf("%d blocks of %d threads", grid.X, block.X)
	}
	return fmt.Sprintf("%d×%d×%d blocks of %d×%d×%d threads", grid.X, grid.Y, grid.Z, block.X, block.Y, block.Z)
}
