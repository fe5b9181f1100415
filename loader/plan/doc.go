// Package plan says what of a model goes where: which tensors, to which device, as which type, in which chunks.
//
// A [Plan] is a value. [New] makes it from a file's header and a [Spec]; after that nobody changes it, and it holds no
// file and no device. What a plan promises can therefore be printed, checked and loaded, and is the same each time.
//
//	p, err := plan.New(file, plan.Spec{Policy: plan.F16}, []uint64{free}) // one device with so many free bytes
//	for _, t := range p.Tensors() {
//		fmt.Println(t.Name, t.Type, "becomes", t.Target, t.Bytes, "bytes")
//	}
//
// # Ranks, devices, groups
//
// [Spec.Shard] is the share of the model that one of several processes (ranks) loads: a run of whole layers, or a slice
// of every large tensor. [Spec.Split] spreads that share over the devices of the process: whole layers on each, or a
// full copy on each. Devices that get the same bytes form a [Group]; every group is loaded by one pipeline. One device
// is one group of one device, and nothing else is special about it.
//
// New checks what it made before it returns it: every tensor of the share is in exactly one group, tensors do not
// overlap in device memory, and the slices of all ranks together are the whole tensor, each index once. A device may
// get nothing when there are more devices than layers; [Group.Tensors] is empty then.
//
// # Device memory and chunks
//
// Tensors lie in device memory in file order, on 256-byte boundaries, in few large allocations. [Group.Cut] divides a
// group into chunks, each of which travels in one copy: a piece of a large tensor, or many small neighbours.
package plan
