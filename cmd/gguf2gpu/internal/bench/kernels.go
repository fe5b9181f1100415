package bench

import (
	"fmt"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Sizes of the buffers for kernels, in bytes.
const (
	MinBuffer    = 16 << 20  // the least; it holds the L2 working set of every type
	MaxBuffer    = 4 << 30   // the most; twice that is about what a machine can spare
	MemoryBuffer = 512 << 20 // the usual size on the CPU: more than the last-level cache of any
	DeviceBuffer = 1 << 30   // the usual size on a device, which has no cache as large as that
)

// Working sets, as they are called in reports.
const (
	SetL2     = "l2"     // output that stays in the L2 cache, input that does not repeat
	SetMemory = "memory" // output and input larger than any cache
	SetDevice = "device" // device memory
)

// isaGPU stands in reports for the instructions of a device.
const isaGPU = "gpu"

// Device says which device was measured.
type Device struct {
	Kind  string `json:"kind"` // "hip" or "soft"
	Index int    `json:"index"`
	Name  string `json:"name"`
}

// KernelsReport is what [CPUKernels] and [DeviceKernels] find, of one thread or of the device.
type KernelsReport struct {
	Device   *Device        `json:"device,omitempty"` // nil: one thread of the CPU
	Ceilings KernelCeilings `json:"ceilings"`
	Kernels  []KernelRun    `json:"kernels"`
}

// KernelCeilings is how fast one thread writes, whatever it computes, or how fast the device copies.
type KernelCeilings struct {
	L2 struct {
		Memcpy float64 `json:"memcpy_gbps"` // 128 KiB to 128 KiB, over and over
	} `json:"l2,omitzero"`
	Memory struct {
		Memcpy float64 `json:"memcpy_gbps"`
		Fill   float64 `json:"fill_gbps"` // with non-temporal stores, if the CPU's best tier has them
	} `json:"memory,omitzero"`
	Device struct {
		Copy float64 `json:"copy_gbps"` // read and written, from device memory to device memory
	} `json:"device,omitzero"`
}

// KernelRun is one conversion in one working set.
type KernelRun struct {
	Type       string  `json:"type"`
	DType      string  `json:"dtype"`
	ISA        string  `json:"isa"`         // "gpu" of a device
	WorkingSet string  `json:"working_set"` // SetL2, SetMemory or SetDevice
	GBps       float64 `json:"out_gbps"`    // bytes of output

	// Of a device only.

	Device bool    `json:"device,omitempty"`
	Moved  float64 `json:"moved_gbps,omitempty"` // bytes read and written
	OfCopy float64 `json:"of_copy,omitempty"`    // moved_gbps as a share of copy_gbps
}

// lower is the name of a type as reports spell it.
func lower(t gguf.Type) string { return strings.ToLower(fmt.Sprint(t)) }
