//go:build !amd64 || purego

package kernels

func copyBytes(dst, src []byte) { copy(dst, src) }
