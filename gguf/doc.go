// Package gguf reads and writes GGUF, the model file format of ggml and llama.cpp: a header, typed metadata, a table of
// tensors, and their data in ggml's block formats.
//
//	file, err := gguf.Open("model.gguf")
//	if err != nil {
//		return err
//	}
//	defer file.Close()
//	for _, t := range file.Tensors() {
//		err := file.Guard(func() error { return use(t.Name, t.Type, t.Shape, file.Data(&t)) })
//		…
//	}
//
// # What is read
//
// Versions 2 and 3 in little-endian byte order, every kind of metadata including nested arrays, every tensor type that
// [Types] lists, any power of two as general.alignment, and models split into files named NAME-00001-of-00003.gguf,
// which open from any of their parts. A file whose split.count is 0 or 1 is whole, whatever other split keys it has.
//
// Tensor data is not copied: [File.Data] is a slice of the mapped file. The header is copied once, so that metadata and
// tensor names outlive the mapping; [OpenView] does without that. Metadata arrays are decoded when they are iterated,
// not when the file is opened. No descriptor is kept open; [Part.Open] opens a part's file again. A file that cannot be
// mapped is read instead: see [File.Remote].
//
// # Types of other programs
//
// Files of ik_llama.cpp and BitNet, and old files, hold tensor types that ggml does not have (any more). Such a file
// can be opened. [Type.Valid] is false for these types, [Type.String] and [Type.Origin] tell their names and where they
// come from, and [File.TypeError] is an error that says all that. Where the layout is known, [Tensor.Size] is too, and
// the data can be copied as it is; otherwise [Tensor.Sized] is false. For a number that nobody is known to use, that is
// all there is to say.
//
// # Limits
//
// A key has 1 to 65535 bytes, a tensor name 1 to 1024. A tensor has 0 to 8 dimensions, of which any may be 0; without
// dimensions it is a scalar. A string or a header has at most 2^30 bytes, the header of a [Source] 2^26, an array at
// most 2^30 elements, and arrays nest at most 16 deep. A file must fit the address space, which has to be of 64 bits.
//
// # Concurrency
//
// All methods but [File.Close] may be called from many goroutines at once. A [Writer] is for one goroutine.
//
// # Security
//
// Files are taken to be hostile. Every count, length, offset and product is checked against the file's size before it
// is used. No file makes Open panic, hang, or allocate more than a small multiple of the file's size. What is wrong
// with a file is reported as a [*FormatError], and what the package prints of a file, in errors and by String methods,
// has its control characters escaped.
//
// A file that is truncated while it is mapped cannot be refused beforehand. Read tensor data inside [File.Guard], which
// turns the fault into an error. The bytes of tensors and the values of metadata are not judged. If another process
// rewrites a file while it is open, its data changes under the reader's eyes.
package gguf
