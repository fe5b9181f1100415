package hostmem

import "unsafe"

// At makes a slice of n bytes of memory that Go did not allocate. The address comes from C as a number; read through a
// pointer to it, the conversion is one that vet and checkptr accept. This is the only place that makes a host address a
// pointer, and Go must never move or free what is there: that is HIP's contract for the memory of asynchronous copies.
func At(addr, n uintptr) []byte {
	return unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&addr))), n)
}
