// Package gguf reads and writes GGUF, the model file format of ggml and llama.cpp: a header, typed metadata, a table of
// tensors, and their data in ggml's block formats.
//
//	model, err := gguf.Open("model.gguf")
//	if err != nil {
//		return err
//	}
//	defer model.Close()
//	for _, t := range model.Tensors() {
//		err := model.Guard(func() error { return use(t.Name, t.Type, t.Shape, model.Data(&t)) })
//		…
//	}
//
// # What is read
//
// Versions 2 and 3 in little-endian byte order, every metadata type including nested arrays, every tensor type that [Types]
// lists, any power of two as general.alignment, and models split into files named NAME-00001-of-00003.gguf, which open from
// any of their parts. Tensor data is not copied: [Model.Data] is a slice of the mapped file. The header is copied once, so
// metadata and tensor names outlive the mapping; its arrays are decoded when they are iterated, not when a model is opened.
//
// # Limits
//
// A key has 1 to 65535 bytes, a tensor name 1 to 63, a tensor 1 to 4 dimensions; a string or a header has at most 2^30
// bytes, an array at most 2^30 elements, and arrays nest at most 16 deep. A model must fit the address space. The only
// tensor without elements that is read is a vector of length 0.
//
// # Concurrency
//
// Everything but [Model.Close] may be called from many goroutines at once. [Writer] is for one goroutine.
//
// # Security
//
// Files are taken to be hostile. Every count, length, offset and product is checked against the file's size before it is
// used; no file makes Open panic, hang, or allocate more than a small multiple of the file's size. What is wrong with a
// file is reported as a [*FormatError]. A file that is truncated while it is mapped cannot be refused beforehand: reads of
// tensor data belong inside [Model.Guard], which turns the fault into an error. The bytes of tensors and the values of
// metadata are not judged; a file that another process rewrites while it is open changes under the reader's eyes.
package gguf
