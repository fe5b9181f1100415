package gguf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// WriterOptions are the properties of a file to be written. The zero value is useful.
type WriterOptions struct {
	Version   uint32 // 2 or 3; 0 means 3
	Alignment uint32 // of tensor data, in bytes: a power of two up to 2^30; 0 means 32
}

// Writer writes a GGUF file as a stream: declare metadata with Set and tensors with AddTensor, call WriteHeader, write
// the data of every tensor in the order of declaration, and call Close. After an error every later call returns the
// same error, so that it is enough to check that of Close. [Open] reads what a Writer has written.
type Writer struct {
	w       io.Writer
	options WriterOptions
	err     error

	keys    map[string]struct{}
	kv      []byte // encoded metadata
	names   map[string]struct{}
	tensors []Tensor // Offset is relative to the data section
	dataLen int64

	started bool
	next    int // index of the tensor whose data comes next
}

// NewWriter returns a Writer that writes to w, which the caller must close. Writes are large, so w need not be
// buffered.
func NewWriter(w io.Writer, o WriterOptions) *Writer {
	if o.Version == 0 {
		o.Version = 3
	}
	if o.Alignment == 0 {
		o.Alignment = defaultAlignment
	}
	wr := &Writer{w: w, options: o, keys: make(map[string]struct{}), names: make(map[string]struct{})}
	switch {
	case o.Version != 2 && o.Version != 3:
		wr.err = fmt.Errorf("gguf: %w: version %d; versions 2 and 3 can be written", ErrUnsupported, o.Version)
	case !legalAlignment(uint64(o.Alignment)):
		wr.err = fmt.Errorf("gguf: alignment %d is not a power of two from 1 to %d", o.Alignment, maxAlignment)
	}
	return wr
}

// fail records the first error, and returns it from then on.
func (w *Writer) fail(format string, args ...any) error {
	if w.err == nil {
		w.err = fmt.Errorf("gguf: "+format, args...)
	}
	return w.err
}

// Set adds a key. The value's Go type decides the kind:
//
//   - uint8 to uint64, int8 to int64, float32, float64, bool and string are scalars;
//   - a slice of one of them is an array;
//   - a []any of such slices is an array of arrays;
//   - a [Value] is copied as it is.
//
// An int is an error, as it has no width in the format. general.alignment comes from the options. It is no error to set
// it to the same number, as copying the metadata of another file does.
func (w *Writer) Set(key string, value any) error {
	switch {
	case w.err != nil:
		return w.err
	case w.started:
		return w.fail("key %q: set after the header was written", key)
	}
	if err := checkText("key", key, maxKey); err != nil {
		return w.fail("%w", err)
	}
	if _, twice := w.keys[key]; twice {
		return w.fail("key %q: %w", key, errDuplicateKey)
	}
	if key == alignmentKey && !isAlignment(value, w.options.Alignment) {
		return w.fail("key %q: %v differs from the writer's alignment, uint32 %d", key, value, w.options.Alignment)
	}
	kv, err := appendValue(appendString(w.kv, key), value)
	if err != nil {
		return w.fail("key %q: %w", key, err)
	}
	w.kv, w.keys[key] = kv, struct{}{}
	return nil
}

func isAlignment(value any, alignment uint32) bool {
	if v, ok := value.(Value); ok {
		n, _ := v.Uint()
		return v.Kind() == KindUint32 && n == uint64(alignment)
	}
	return value == any(alignment)
}

// checkText checks a key or a tensor name by the rules of scan.
func checkText(what, s string, limit int) error {
	switch {
	case s == "" || len(s) > limit:
		return fmt.Errorf("%s %q has %d bytes; 1 to %d are allowed", what, shorten(s), len(s), limit)
	case !utf8.ValidString(s):
		return fmt.Errorf("%s %q is not UTF-8", what, shorten(s))
	case strings.IndexByte(s, 0) >= 0:
		return fmt.Errorf("%s %q contains a NUL byte", what, shorten(s))
	}
	return nil
}

// AddTensor declares a tensor. The shape is in ggml's order: the first dimension is contiguous. It has up to 8
// dimensions; a tensor without dimensions is a scalar. A type that ggml does not have is accepted if the tensor's size
// is known.
func (w *Writer) AddTensor(name string, t Type, shape ...uint64) error {
	switch {
	case w.err != nil:
		return w.err
	case w.started:
		return w.fail("tensor %q: added after the header was written", name)
	}
	if err := checkText("tensor name", name, maxName); err != nil {
		return w.fail("%w", err)
	}
	if _, twice := w.names[name]; twice {
		return w.fail("tensor %q: %w", name, errDuplicateTensor)
	}
	size, err := shapeSize(t, shape)
	if err == nil && size == unknownSize {
		err = fmt.Errorf("%w; the size of a tensor %v is not known", t.Err(), shape)
	}
	if err != nil {
		return w.fail("tensor %q: %w", name, err)
	}
	end := pad(uint64(w.dataLen)+uint64(size), w.options.Alignment) // of two numbers below 2^63: no overflow
	if end >= 1<<63 {
		return w.fail("tensor %q: all tensors together have more than 2^63 bytes", name)
	}
	w.names[name] = struct{}{}
	w.tensors = append(w.tensors, Tensor{
		Name: name, Type: t, Shape: slices.Clone(shape), Offset: w.dataLen, Size: size,
	})
	w.dataLen = int64(end)
	return nil
}

// WriteHeader writes metadata and the table of tensors. Nothing can be declared after it.
func (w *Writer) WriteHeader() error {
	switch {
	case w.err != nil:
		return w.err
	case w.started:
		return w.fail("header is written twice")
	}
	if _, set := w.keys[alignmentKey]; !set && w.options.Alignment != defaultAlignment {
		if err := w.Set(alignmentKey, w.options.Alignment); err != nil {
			return err
		}
	}
	b := append([]byte("GGUF"), 0, 0, 0, 0)
	le := binary.LittleEndian
	le.PutUint32(b[4:], w.options.Version)
	b = le.AppendUint64(b, uint64(len(w.tensors)))
	b = le.AppendUint64(b, uint64(len(w.keys)))
	b = append(b, w.kv...)
	for _, t := range w.tensors {
		b = appendString(b, t.Name)
		b = le.AppendUint32(b, uint32(len(t.Shape)))
		for _, d := range t.Shape {
			b = le.AppendUint64(b, d)
		}
		b = le.AppendUint32(b, uint32(t.Type))
		b = le.AppendUint64(b, uint64(t.Offset))
	}
	if len(w.tensors) > 0 {
		b = append(b, make([]byte, pad(uint64(len(b)), w.options.Alignment)-uint64(len(b)))...)
	}
	w.started, w.kv = true, nil
	return w.write(b)
}

func (w *Writer) write(b []byte) error {
	if _, err := w.w.Write(b); err != nil {
		return w.fail("write: %w", err)
	}
	return nil
}

// WriteTensor writes the data of the next tensor and pads it. The name is given so that a wrong order is noticed.
func (w *Writer) WriteTensor(name string, data []byte) error {
	t, err := w.begin(name)
	if err != nil {
		return err
	}
	if int64(len(data)) != t.Size {
		return w.fail("tensor %q: %d bytes of data for %d", name, len(data), t.Size)
	}
	if err := w.write(data); err != nil {
		return err
	}
	return w.end(t)
}

// CopyTensor is WriteTensor with data from a reader. It reads just the bytes of the tensor.
func (w *Writer) CopyTensor(name string, r io.Reader) error {
	t, err := w.begin(name)
	if err != nil {
		return err
	}
	n, err := io.CopyN(w.w, r, t.Size)
	switch {
	case errors.Is(err, io.EOF):
		return w.fail("tensor %q: %d bytes of data for %d: %w", name, n, t.Size, io.ErrUnexpectedEOF)
	case err != nil:
		return w.fail("tensor %q: %w", name, err)
	}
	return w.end(t)
}

// begin checks that it is this tensor's turn, and returns the tensor.
func (w *Writer) begin(name string) (*Tensor, error) {
	switch {
	case w.err != nil:
		return nil, w.err
	case !w.started:
		return nil, w.fail("tensor %q: data before the header", name)
	case w.next == len(w.tensors):
		return nil, w.fail("tensor %q: data after that of the last tensor", name)
	case w.tensors[w.next].Name != name:
		return nil, w.fail("tensor %q: data comes when that of tensor %q is due", name, w.tensors[w.next].Name)
	}
	return &w.tensors[w.next], nil
}

// end pads the tensor's data. The last tensor is padded as well, because ggml's loader wants those bytes.
func (w *Writer) end(t *Tensor) error {
	w.next++
	return w.write(make([]byte, pad(t.Size, w.options.Alignment)-t.Size))
}

// Close checks that the file is complete. It does not close the underlying writer.
func (w *Writer) Close() error {
	switch {
	case w.err != nil:
		return w.err
	case !w.started:
		return w.fail("closed before the header was written")
	case w.next < len(w.tensors):
		return w.fail("closed before the data of tensor %q, %d of %d, was written",
			w.tensors[w.next].Name, w.next+1, len(w.tensors))
	}
	return nil
}
