// Package measure finds the ceilings of a machine: what its link, its memory and its disk can carry. The speed of a
// load means something only as a share of these, measured in the same process just before or after.
//
//	link, err := measure.Link(ctx, dev)            // bytes per second
//	...
//	share := float64(report.UploadBytes) / report.Transfer.Seconds() / link
//
// Each measurement takes about half a second, [Read] as long as reading takes. A measurement is disturbed by whatever
// else the machine does; nothing else of the process should run meanwhile.
package measure
