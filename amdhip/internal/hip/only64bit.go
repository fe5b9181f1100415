//go:build 386 || arm || mips || mipsle

package hip

// A GPU's memory does not fit in 32 bits: addresses, sizes and handles are taken for 64 bits everywhere. The identifier
// does not exist, so that the compiler says why it stops.
var _ = gguf2gpu_needs_a_64_bit_platform
