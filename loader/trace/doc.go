// Package trace records what a load does and when, and writes it as Chrome trace-event JSON, which Perfetto
// (ui.perfetto.dev) and chrome://tracing open.
//
//	var tr trace.Trace
//	model, err := l.Load(ctx, p, loader.Request{Trace: &tr})
//	...
//	_, err = tr.WriteTo(file)
//
// There is a track for each worker and for each stream. Workers wait for a staging buffer ("wait"), fill it ("convert",
// "copy" and others, with a "read" inside where bytes come from a disk or a server), and enqueue its copy ("issue").
// Streams copy to the device ("copy"). Each span has the first tensor that it is about, and its number of bytes.
//
// # Overlaps
//
// What draws timelines drops a span that overlaps another one of its track in part. How long a copy takes is measured
// on the device; its end is seen by the host, and often late. Two copies of a stream may so seem to overlap. WriteTo
// therefore places spans of the same name on a track one behind the other: a span that ended late is moved back, and
// keeps its duration.
package trace
