package gguf

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

// File is an open GGUF file: one file on disk, or all parts of a split one. All methods but Close are safe for
// concurrent use.
type File struct {
	parts   []*Part
	tensors []Tensor
	index   *names // finds tensors by name

	closeOnce sync.Once
	closeErr  error
}

// Open opens a file for reading. For a split file, path may name any part; the other parts must be in the same
// directory. The caller must Close the file. If the content is wrong, the error is a *[FormatError]. If a file cannot
// be opened or mapped, it is a *[os.PathError].
func Open(path string) (*File, error) {
	dir := filepath.Dir(path)
	return openAll(path, openPart, func(name string) (*Part, error) { return openPart(filepath.Join(dir, name)) })
}

// OpenView is [Open] for a program that looks at a file once, such as one that prints a header. It does not copy the
// header: metadata, texts and names are slices of the mapping. Read them inside [File.Guard], and not after
// [File.Close]. So a file takes no memory for what is in its header, but some 100 bytes for each tensor and 10 for each
// key. If another process changes the file meanwhile, texts change, and Guard returns an error where that is noticed.
//
// A file that cannot be mapped is read, and its header then is in memory.
func OpenView(path string) (f *File, err error) {
	dir := filepath.Dir(path)
	var opened []*Part
	open := func(path string) (*Part, error) {
		p, err := openPartBy(path, mapFile, true)
		if err == nil {
			opened = append(opened, p)
		}
		return p, err
	}
	finished := false
	err = guardAll(func() []*Part { return opened }, func() (err error) {
		f, err = openAll(path, open, func(name string) (*Part, error) { return open(filepath.Join(dir, name)) })
		finished = true
		return err
	})
	if !finished { // otherwise openAll has closed what was opened before an error
		err = errors.Join(err, closeParts(opened))
	}
	return f, err
}

// opener opens the part with the given name.
type opener = func(name string) (*Part, error)

// openAll opens the part called name with open, and the other parts of the same split with openOther.
func openAll(name string, open, openOther opener) (*File, error) {
	first, err := open(name)
	if err != nil {
		return nil, err
	}
	parts, err := openSplit(first, openOther)
	if err == nil {
		var f *File
		if f, err = newFile(parts); err == nil {
			return f, nil
		}
	}
	return nil, errors.Join(detach(err), closeParts(parts))
}

// newFile builds a File from its parts, which must be in split order.
func newFile(parts []*Part) (*File, error) {
	n := 0
	for _, p := range parts {
		n += p.infos
	}
	all := make([]Tensor, n)
	f := &File{parts: parts, tensors: all[:0], index: newNames(n, func(i int) string { return all[i].Name })}
	for i, p := range parts {
		var err error
		if f.tensors, err = p.readTensors(f.tensors, i, f.index); err != nil {
			return nil, err
		}
	}
	// readTensors has sorted the tensors after it entered them in the index, so the index is built again.
	clear(f.index.slots)
	for i := range f.tensors {
		f.index.add(i)
	}
	return f, nil
}

// Close unmaps and closes all parts. Slices from [File.Data] and [Part.Bytes] are invalid after it, so no other method
// may be running. Metadata, names and tensors stay valid. Calling Close again does nothing and returns the same error.
func (f *File) Close() error {
	f.closeOnce.Do(func() { f.closeErr = closeParts(f.parts) })
	return f.closeErr
}

// closeParts closes the parts, the last one first.
func closeParts(parts []*Part) error {
	var errs []error
	for _, p := range slices.Backward(parts) {
		errs = append(errs, p.close())
	}
	return errors.Join(errs...)
}

// String describes the file in one line, for logs: its path, number of parts and tensors, and size.
func (f *File) String() string {
	return fmt.Sprintf("%s (%d parts, %d tensors, %d bytes)",
		term.Safe(f.parts[0].Path), len(f.parts), len(f.tensors), f.Size())
}

// Architecture returns the value of general.architecture, such as "llama". It is "" if the key is missing.
func (f *File) Architecture() string {
	arch, _ := f.Metadata().Text("general.architecture")
	return arch
}

// Metadata returns the metadata of the first part. It is complete but for the split.* keys of later parts.
func (f *File) Metadata() *Metadata { return f.parts[0].metadata }

// Parts returns the parts in split order. The caller must not modify the slice.
func (f *File) Parts() []*Part { return f.parts }

// Tensors returns all tensors, sorted by part and then by offset. The caller must not modify the slice.
func (f *File) Tensors() []Tensor { return f.tensors }

// Tensor returns the tensor with the given name. ok is false if there is none.
func (f *File) Tensor(name string) (t *Tensor, ok bool) {
	i, ok := f.index.find(name)
	if !ok {
		return nil, false
	}
	return &f.tensors[i], true
}

// Data returns the bytes of a tensor of this file, as a slice of the mapping and not as a copy. The caller must not
// write to it, must read it inside [File.Guard], and must not use it after [File.Close]. Data returns nil after Close,
// for a file that is read from a [Source] (use [File.Range] there), and for a tensor of unknown size (see
// [Tensor.Sized]).
func (f *File) Data(t *Tensor) []byte {
	b := f.parts[t.Part].data
	if b == nil || !t.Sized() {
		return nil
	}
	end := t.Offset + t.Size
	return b[t.Offset:end:end]
}

// TypeError returns nil if the tensor has a type of ggml. For other types it returns a *[FormatError] that matches
// [ErrUnsupported] and names the file, the tensor, the type and the program that the type comes from.
func (f *File) TypeError(t *Tensor) error {
	err := t.Type.Err()
	if err == nil {
		return nil
	}
	switch n, _ := shapeSize(t.Type, t.Shape); { // Open has checked the shape
	case t.Sized():
	case n == unknownSize:
		err = fmt.Errorf("%w; the size of a tensor %v is not known", err, t.Shape)
	default:
		err = fmt.Errorf("%w; there is no room for the %d bytes of a tensor %v: "+
			"the file is truncated, or it uses the number for another type", err, n, t.Shape)
	}
	return &FormatError{Path: f.parts[t.Part].Path, Offset: -1, Tensor: t.Name, Field: "type", Err: err}
}

// Size returns the size of all parts together, in bytes.
func (f *File) Size() uint64 {
	var n uint64
	for _, p := range f.parts {
		n += uint64(p.Size)
	}
	return n
}
