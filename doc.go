// Package gguf2gpu is the root of a module that puts the weights of GGUF models into AMD GPU memory, without cgo, ROCm
// headers or a C compiler at build time. It holds no code itself. A program that loads models wants package loader, and
// from package amdhip the device, from package gguf the file, from package loader/plan what goes where:
//
//   - amdhip binds the HIP runtime when the program runs; amdhip/soft is a software device for machines without a GPU
//   - gguf reads and writes the file format
//   - kernels dequantizes ggml's block formats on the CPU, kernels/gpu on the device
//   - pinned is the pool of page-locked staging buffers
//   - loader is the pipeline from the file to device memory; loader/plan says what goes where, loader/readback compares
//     and exports, loader/hold keeps models for other processes, loader/remote reads models on servers, loader/rank
//     finds out which of several processes this is, loader/measure and loader/trace say how fast a load was and why
//
// The command in cmd/gguf2gpu does all that from a shell.
package gguf2gpu
