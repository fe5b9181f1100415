// Package gpu converts blocks of ggml tensor types to float32 (F32), binary16 (F16) or bfloat16 (BF16) on the GPU. It
// has the kernels as HIP C++, and compiles, caches, checks and launches them. The output is bit-identical to that of
// package kernels; only the sign and the payload of a NaN may differ.
//
//	c := gpu.Compiler{Run: gpu.Child(program, "compile")}
//	key := gpu.Key{To: gguf.F16, From: gguf.Q4_K}
//	set, err := c.Load(ctx, dev, []gpu.Key{key})
//	...
//	defer set.Close()
//	err = set.Launch(stream, key, out, in, blocks)
//
// # Compiling
//
// hipRTC compiles each kernel for the architecture of the device, in a fraction of a second. [Compiler] keeps the code
// objects in files, under names that are hashes of everything that they depend on. Nothing removes old files; the
// directory may be deleted at any time.
//
// SOME VERSIONS OF AMD'S COMPILER END THE PROCESS (SIGABRT, which no program can catch) for an architecture that they
// do not know. So the zero Compiler compiles nothing, and only uses kernels that are in the cache; for others the error
// matches [ErrNotCompiled]. A program chooses one of these:
//
//   - Compiler.Run compiles elsewhere. [Child] makes a Run that starts a program, for instance this one with other
//     arguments, which calls [ServeChild].
//   - Compiler.InProcess compiles in this process, at its own risk.
//
// # Checking
//
// Each kernel that is loaded first converts some blocks, which are compared with the result of the CPU. So a device or
// a compiler that computes wrongly gives a [*CheckError], and not a wrong model.
//
// # Fingerprints
//
// One kernel converts nothing: Key{Fingerprint: true} is that of [Set.Fingerprint], which computes the fingerprints of
// package kernels over device memory.
//
// # The software device
//
// On the software device, package kernels does the work of the kernels. It refuses addresses that are not aligned and
// memory without padding, as Launch documents them. Nothing else has to be set: there is no compiler that could end the
// process.
package gpu
