//go:build 386 || arm || mips || mipsle

package gguf

// A 32-bit process cannot map a model, and constants of this module do not fit its int. The name below is not defined,
// so that the compiler's error gives the reason.
var _ = this_module_needs_a_64_bit_platform_because_models_do_not_fit_a_32_bit_address_space
