package amdhip

// Dim3 is the size of a grid or a block in three dimensions. X varies fastest.
type Dim3 struct{ X, Y, Z uint32 }

// KernelCall is a launch of a kernel as the Go function that stands in for the kernel sees it, see StandIns.
type KernelCall struct {
	Grid        Dim3     // in blocks
	Block       Dim3     // in threads
	SharedBytes uint32   // of dynamic shared memory, per block
	Args        []uint64 // the first 8 bytes of each argument, or all if it has fewer, with zeros above them
	Params      [][]byte // all bytes of each argument

	// Memory returns n bytes at p, which must lie inside one live allocation of the stream's device or inside
	// page-locked host memory whose HostMemory.DevicePtr was asked for; else the answer is ErrIllegalAddress. The bytes
	// are valid until the function that stands in for the kernel returns. It may be called from several goroutines.
	Memory func(p DevicePtr, n uint64) ([]byte, Status)
}

// StandIns is implemented by what Runtime.Backend returns for a device that has no compiler and runs Go functions in
// place of kernels: the software device. A program offers its stand-ins through it without importing the software
// device:
//
//	if s, ok := dev.Runtime().Backend().(amdhip.StandIns); ok {
//		s.Offer("scale", 3, scale)
//	}
type StandIns interface {
	// Offer makes run stand in for kernels of that name, which take that many parameters of 8 bytes each and are
	// launched on grids of one dimension, without dynamic shared memory. A launch calls it once for the whole grid; a
	// Status other than Success makes the stream fail.
	Offer(kernel string, params int, run func(*KernelCall) Status)
	// OfferKernel is Offer for kernels of any shape: sizes are those of the parameters, in bytes.
	OfferKernel(kernel string, sizes []int, run func(*KernelCall) Status)
}
