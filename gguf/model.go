package gguf

import (
	"errors"
	"path/filepath"
	"slices"
	"sync"
)

// Model is an opened model: one file, or all parts of a split one. Everything but Close is safe for concurrent use.
type Model struct {
	parts   []*Part
	tensors []Tensor
	index   *names // in tensors

	closeOnce sync.Once
	closeErr  error
}

// Open opens a model for reading. Of a split model, path may be any part; the others are expected beside it. The caller must
// Close the model. What is wrong with a file is reported as a *[FormatError]; a file that cannot be opened or mapped, as a
// *[os.PathError].
func Open(path string) (*Model, error) {
	dir := filepath.Dir(path)
	return openAll(path, openPart, func(name string) (*Part, error) { return openPart(filepath.Join(dir, name)) })
}

// opener opens a part by its name.
type opener = func(name string) (*Part, error)

// openAll opens the part called name, and those that belong to it by their names.
func openAll(name string, open, openOther opener) (*Model, error) {
	first, err := open(name)
	if err != nil {
		return nil, err
	}
	parts, err := openSplit(first, openOther)
	if err == nil {
		var m *Model
		if m, err = newModel(parts); err == nil {
			return m, nil
		}
	}
	return nil, errors.Join(err, closeParts(parts))
}

// newModel joins parts, which are in order.
func newModel(parts []*Part) (*Model, error) {
	n := 0
	for _, p := range parts {
		n += p.records()
	}
	all := make([]Tensor, n)
	m := &Model{parts: parts, tensors: all[:0], index: newNames(n, func(i int) string { return all[i].Name })}
	for i, p := range parts {
		var err error
		if m.tensors, err = p.readTensors(m.tensors, i, m.index); err != nil {
			return nil, err
		}
	}
	clear(m.index.slots) // tensors have been sorted since they were entered
	for i := range m.tensors {
		m.index.add(i)
	}
	return m, nil
}

// Close unmaps and closes all files. Slices from [Model.Data] and [Part.Bytes] must not be used any more, so no other
// method may be running; metadata, names and tensors stay valid. Further calls do nothing and return the same.
func (m *Model) Close() error {
	m.closeOnce.Do(func() { m.closeErr = closeParts(m.parts) })
	return m.closeErr
}

// closeParts closes in reverse order of opening.
func closeParts(parts []*Part) error {
	var errs []error
	for _, p := range slices.Backward(parts) {
		errs = append(errs, p.close())
	}
	return errors.Join(errs...)
}

// Architecture returns general.architecture, such as "llama", or "" where it is missing.
func (m *Model) Architecture() string {
	arch, _ := m.Metadata().String("general.architecture")
	return arch
}

// Metadata returns the metadata of the first part, which holds all of a model's but for the split.* keys of later parts.
func (m *Model) Metadata() *Metadata { return m.parts[0].metadata }

// Parts returns the model's files in split order. The slice must not be modified.
func (m *Model) Parts() []*Part { return m.parts }

// Tensors returns all tensors in file order: by part, then by offset. The slice must not be modified.
func (m *Model) Tensors() []Tensor { return m.tensors }

// Tensor returns the tensor of that name.
func (m *Model) Tensor(name string) (*Tensor, bool) {
	i, ok := m.index.find(name)
	if !ok {
		return nil, false
	}
	return &m.tensors[i], true
}

// Data returns the bytes of a tensor of this model: a slice of the mapping, not a copy. It must not be written to, is to be
// read inside [Model.Guard], and dies with [Model.Close], after which Data returns nil. It is nil as well for a part that is
// not mapped but read from a [Source]: see [Model.Range].
func (m *Model) Data(t *Tensor) []byte {
	b := m.parts[t.Part].data
	if b == nil {
		return nil
	}
	end := t.Offset + t.Size
	return b[t.Offset:end:end]
}

// Size returns the sum of the files' sizes in bytes.
func (m *Model) Size() uint64 {
	var n uint64
	for _, p := range m.parts {
		n += uint64(p.Size)
	}
	return n
}
