// Package gguf2gpu is the root of a module that puts the weights of GGUF models into AMD GPU memory, without cgo, ROCm
// headers or a C compiler at build time. It holds no code itself. A program that loads models wants package loader, and
// from package amdhip the device, from package gguf the model:
//
//   - amdhip binds the HIP runtime when the program runs, and has a software device for machines without a GPU
//   - gguf reads and writes the file format
//   - kernels dequantizes ggml's block formats
//   - pinned is the pool of page-locked staging buffers
//   - loader is the pipeline from the file to device memory
//
// The command in cmd/gguf2gpu does all that from a shell.
package gguf2gpu
