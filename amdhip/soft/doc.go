// Package soft is a GPU made of Go functions: devices, streams, events, memory and kernels that behave as HIP's do,
// without a GPU and without a library. It fills the table of functions that package amdhip calls, so a program does not
// see which of the two it runs on:
//
//	dev, err := soft.Open(soft.Options{})
//	if err != nil {
//		return err
//	}
//	defer dev.Runtime().Close()
//
// It does work later, in order and on other goroutines, as a GPU does: a copy reads its source when it executes, so a
// staging buffer that is used again too early corrupts data. Device memory has a capacity; addresses are checked for
// out-of-range, double free and use after free. Options can model a link with a speed and a latency. Software, which Of
// returns, counts what is there and what was done, makes calls fail and stall (Inject), flips bits (Flip, FlipBit) and
// runs Go functions in place of kernels (Offer).
//
// It answers as HIP 6.2 does, only more strictly where HIP would go on in a way that is slow or undefined. Software
// says where.
package soft
