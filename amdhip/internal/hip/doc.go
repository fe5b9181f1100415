// Package hip is what a HIP library and the software device have in common: the table of functions that both fill,
// HIP's codes and constants, and the seam through which package amdhip gets a filled table. It has no behaviour of its
// own.
package hip
