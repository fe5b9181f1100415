//go:build !linux

package main

// memlockLimit is empty where HIP is not supported.
func memlockLimit() string { return "" }
