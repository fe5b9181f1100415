// Package hostmem maps memory outside Go's heap, which a device may touch after the call that told it to has returned,
// and makes slices of memory that C allocated.
package hostmem
