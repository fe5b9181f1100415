// Package loader puts the tensors of a GGUF model into device memory.
//
//	model, err := loader.Load(ctx, file, plan.Spec{Policy: plan.F16}, dev) // one device or several
//	if err != nil {
//		return err // nothing is left on the device
//	}
//	defer model.Close()
//	q, err := model.Tensor("blk.0.attn_q.weight") // q.Device, q.Ptr, q.Type, q.Shape, q.Bytes
//
// # Many loads, and loads that are waited for tensor by tensor
//
// A [Loader] makes what is expensive once (staging memory, streams, events, the devices' kernels) and serves many loads
// with it, at once and in turn. [Loader.Start] returns when device memory is allocated; tensors then arrive in the
// order of the file, and [Model.Wait] and [Model.WaitStream] wait for single ones: layer 0 can compute while layer 30
// is on its way.
//
//	l, err := loader.New(devices, loader.Config{Streams: 4, Threads: 8})
//	p, err := l.Plan(file, spec)                       // a plan that was printed is the plan that is loaded
//	model, err := l.Start(ctx, p, loader.Request{Progress: progress})
//	err = model.WaitStream(ctx, stream, "blk.0.attn_q.weight")
//
// [LoadSync] and [Loader.LoadSync] are the plain loader, one copy at a time, that the pipeline is compared with. Both
// give the same bytes. New, Start and LoadSync are what the design that this package comes from (ROCmForge's
// asynchronous GPU loading) called AsyncModelLoader::new, load_to_gpu_async and the synchronous loader.
//
// # One path
//
// One device is several devices with a count of one. Whatever the spec asks for (a split over devices, one rank's
// shard, a model on a server), it becomes a [plan.Plan] of groups, each group is loaded by one pipeline, and the result
// is one [Model], whose tensors say which device they are on.
//
// In a pipeline workers take chunks in file order, dequantize or copy them into a bounded pool of pinned staging
// buffers, and enqueue asynchronous copies; a buffer is used again when its copy is done. Host memory is bounded by
// Config.Staging and does not depend on the model. Everything that has a size (workers, connections, buffers, streams)
// gets it from one function of the devices, the plan and the config.
//
// # Proof
//
// Request.Prove compares fingerprints that the devices compute of what they got with those of what was sent to them. A
// difference is a [*ProveError]; [Model.Fingerprints] tells what was found.
//
// # What is left after an error
//
// Every plan is checked against free device memory before anything is allocated. A load that fails or is cancelled
// gives back all that it took, with one exception: when a device does not come to rest ([ErrStalled]), what it may
// still touch is never freed, and Close says how much that is ([LeftError]).
//
// # Other packages
//
// Package loader/plan says what goes where, loader/readback compares and exports what is on a device, loader/hold keeps
// models for other processes, loader/remote opens models on servers, loader/measure and loader/trace say how fast a
// load was and why. README.md has the figures behind the sizes.
//
// Functions and methods are safe for concurrent use.
package loader
