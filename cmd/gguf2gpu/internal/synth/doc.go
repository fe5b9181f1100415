// Package synth writes model files that look like real ones: the tensors, metadata and vocabulary size of a real
// model, and random weights of a sensible size. Tests and benchmarks use them where a real model would be too large
// to keep or to download.
//
// A [Model] is a [Preset], which gives the shape, [Types], which give the type of each matrix, and a seed. The same
// three give the same bytes on every machine, on any number of cores.
package synth
