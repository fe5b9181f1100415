// Package bench measures how fast models load, and how fast single kernels dequantize, beside what the same machine
// does at most. Each figure comes with its ceiling from the same process, because a time alone says nothing of another
// machine.
//
// [Loads] measures loads of a model. It knows nothing of the loader: whoever uses it says by functions how to load once
// and how to measure the link, the memory and the disk. [CPUKernels] and [DeviceKernels] measure kernels alone.
//
// [Chart] draws a report as an SVG document that can stand alone in a paper.
//
// Speeds in reports are in units of 10^9 bytes per second. Where something is measured several times, the median
// counts.
package bench
