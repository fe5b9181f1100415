// Package loader puts the tensors of a GGUF model into device memory.
//
// [Load] runs the pipeline: workers read chunks of the file in order, dequantize or copy them into a bounded pool of pinned
// staging buffers, and start asynchronous copies on several streams; a buffer is used again when its copy is done. [Start] is
// the same without waiting for the end: [Model.Wait] and [Model.WaitStream] then wait for single tensors. [LoadSync] is the
// plain loader, one copy at a time, that the pipeline is compared with. All give the same bytes.
//
//	weights, err := loader.Load(ctx, dev, file, loader.Options{DType: loader.F16})
//	if err != nil {
//		return err // nothing is left on the device
//	}
//	defer weights.Close()
//	q, err := weights.Tensor("blk.0.attn_q.weight") // q.Ptr, q.DType, q.Shape, q.Bytes
//
// A model may also be on a server: what [gguf.OpenSource] opens is read by ranges, many at a time; package loader/remote opens
// addresses.
//
// [LoadSplit] and [StartSplit] spread a model over several devices of the process, whole layers or a copy on each; Options.Shard
// is the share that this process, one of several ranks, loads: a run of layers, or a slice of every matrix. Both can be combined.
//
// Host memory is bounded by Options.Staging and does not depend on the model. Every plan is checked against free device
// memory before anything is allocated. A load that fails or is cancelled gives back all that it took, with one exception: when
// the device does not come to rest ([ErrStalled]), what it may still touch is never freed.
//
// A [Holder] keeps models for other processes of the host, and [Attach] maps one of them, in milliseconds and without another copy:
//
//	weights, err := loader.Attach(ctx, "", "") // the only model at the usual place
//	if err != nil {
//		return err
//	}
//	defer weights.Close()   // unmaps
//	case <-weights.Gone():  // somewhere: the process that holds it has ended, its pointers must not be used
//
// Functions and methods are safe for concurrent use; several loads may run at once, on one device or on several.
package loader
