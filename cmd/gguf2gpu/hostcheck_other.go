//go:build !linux

package main

// memlockLimit finds no limit where HIP is not supported.
func memlockLimit() (bytes uint64, ok bool) { return 0, false }
