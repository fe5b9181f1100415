// Package gpu is dequantization on the GPU: HIP C++ that turns blocks of ggml's tensor types into float32, binary16 or bfloat16
// on the device, and what it takes to compile, keep, check and launch it. Outputs are bit for bit those of package kernels;
// NaNs alone may differ, in sign and payload.
//
//	c := gpu.Compiler{}
//	key := gpu.Key{To: gguf.F16, From: gguf.Q4_K}
//	set, err := c.Load(ctx, dev, []gpu.Key{key})
//	...
//	defer set.Close()
//	err = set.Launch(stream, key, out, in, blocks)
//
// # Compiling
//
// Kernels are compiled by hipRTC, for the very device that they run on, which takes a fraction of a second for each. The
// outcome is kept in files, see [Compiler], under a name that is made of all that went into it. Nothing removes old files;
// the directory may be deleted at any time.
//
// SOME VERSIONS OF AMD'S COMPILER END THE PROCESS (SIGABRT, which no program can catch) when they do not know the architecture.
// With the zero Compiler that is this process. Where it must not die, set Compiler.Run to compile elsewhere: [Child] makes a
// function that starts a program for that, which calls [ServeChild].
//
// # Checking
//
// Each kernel that is loaded converts some blocks first, which are compared with what the CPU makes of them. A device or a
// compiler that computes wrongly is an error then, not a wrong model.
//
// # The software device
//
// There, package kernels stands in for the kernels. The stand-ins refuse addresses that are not aligned, and memory whose padding
// is not there.
package gpu
