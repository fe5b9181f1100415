package gguf

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"unsafe"

	"github.com/edsrzf/mmap-go"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

const (
	alignmentKey     = "general.alignment"
	defaultAlignment = 32      // GGUF_DEFAULT_ALIGNMENT of ggml
	maxAlignment     = 1 << 30 // beyond all reason; keeps sums far from overflow
)

// Part is one file of a split, or the only one of a file that is not split.
type Part struct {
	Path       string // as given to Open, or its neighbour in the same directory; the Path of a Source
	Version    uint32 // of the format: 2 or 3
	Size       int64  // of the file, in bytes
	Alignment  uint32 // of tensors, in bytes, relative to DataOffset
	DataOffset int64  // where the data section starts, in bytes

	name     string // without its directory
	metadata *Metadata
	header   string // metadata and tensor names are slices of it
	view     bool   // the part was opened by OpenView: header is a slice of the mapping
	tensors  []Tensor

	// Where the tensor records start in header, how many there are, and how many dimensions they have together.
	tensorInfo, infos, dims int

	// One of these two holds the file's bytes.
	data   mmap.MMap
	source Source
	kept   mmap.MMap // beside a source: the mapping that header is a slice of

	absolute string      // the path, for Open
	info     os.FileInfo // of the file that was mapped

	descriptor *descriptor
}

// Bytes returns the mapping of the whole file. The caller must not write to it, must read it inside [File.Guard], and
// must not use it after [File.Close]. Bytes returns nil after Close, and for a part that is read from a [Source].
func (p *Part) Bytes() []byte { return p.data }

// Metadata returns the metadata of this part alone.
func (p *Part) Metadata() *Metadata { return p.metadata }

// String describes the part in one line, for logs.
func (p *Part) String() string {
	return fmt.Sprintf("%s (GGUF version %d, %d tensors, %d bytes)", term.Safe(p.Path), p.Version, p.infos, p.Size)
}

// Info returns what the system said of the file when it was opened: its modification time, and what [os.SameFile]
// compares. It is nil for a part that is read from a [Source].
func (p *Part) Info() os.FileInfo { return p.info }

// Open opens the part's file once more, for reads that do not go through the mapping. flag is added to [os.O_RDONLY],
// such as O_DIRECT on Linux. The caller must Close what it gets, and should not keep one for each of hundreds of parts.
//
// The error matches [ErrReplaced] if another file has taken this one's place since; the mapping is still that of the
// old one. It matches [ErrUnsupported] for a part that is read from a [Source], and is a *[os.PathError] otherwise.
func (p *Part) Open(flag int) (*os.File, error) {
	if p.info == nil {
		return nil, fmt.Errorf("gguf: %w: %s is not a file of this system", ErrUnsupported, term.Safe(p.Path))
	}
	f, err := openReadOnly(p.absolute, flag)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !os.SameFile(info, p.info) {
		err = &FormatError{Path: p.Path, Offset: -1, Err: ErrReplaced}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// openReadOnly opens a file for reading. It does not wait if the file is a named pipe.
func openReadOnly(path string, flag int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|openNonblock|flag, 0)
	if err != nil {
		return nil, explain(err)
	}
	if err := setBlocking(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// openPart opens and maps a file, and reads its header.
func openPart(path string) (*Part, error) { return openPartBy(path, mapFile, false) }

// openPartBy is openPart with a function that maps a file of the given size. If that fails, the part is read from the
// file instead. The file stays open in that case only: a mapping outlives its descriptor, and a process may have no
// more than a thousand. Nothing stays open on an error.
//
// With view, the header of a file that is mapped is not copied.
func openPartBy(path string, mapFile func(f *os.File, size int) (mmap.MMap, error), view bool) (*Part, error) {
	info, err := os.Stat(path) // before it is opened, as merely opening a device can do something to it
	if err != nil {
		return nil, explain(err)
	}
	if err := checkRegular(path, info); err != nil {
		return nil, err
	}
	f, err := openReadOnly(path, 0)
	if err != nil {
		return nil, err
	}
	p := &Part{Path: path, name: filepath.Base(path), absolute: path, view: view, descriptor: new(descriptor)}
	if abs, err := filepath.Abs(path); err == nil {
		p.absolute = abs // so that Open works after a change of the working directory
	}
	keep, err := p.load(f, mapFile)
	if !keep {
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return nil, errors.Join(detach(err), p.close())
	}
	return p, nil
}

// checkRegular refuses a file that cannot be mapped or never ends. Symbolic links have been followed already, as caches
// of models consist of them.
func checkRegular(path string, info os.FileInfo) error {
	if info.Mode().IsRegular() {
		return nil
	}
	what := "a special file"
	switch mode := info.Mode(); {
	case mode.IsDir():
		what = "a directory"
	case mode&os.ModeNamedPipe != 0:
		what = "a named pipe"
	case mode&os.ModeDevice != 0:
		what = "a device"
	case mode&os.ModeSocket != 0:
		what = "a socket"
	}
	return &FormatError{Path: path, Offset: -1, Err: fmt.Errorf("%w: %s, not a regular file", ErrNotGGUF, what)}
}

// load maps the open file and reads its header. keep says that the part needs the descriptor from now on.
func (p *Part) load(f *os.File, mapFile func(f *os.File, size int) (mmap.MMap, error)) (keep bool, err error) {
	if p.info, err = f.Stat(); err != nil {
		return false, err
	}
	if err := checkRegular(p.Path, p.info); err != nil { // another file may have taken its place
		return false, err
	}
	p.Size = p.info.Size()
	if p.Size == 0 { // which cannot be mapped
		return false, p.parse(nil)
	}
	if p.data, err = mapFile(f, int(p.Size)); err != nil {
		p.source = &fileSource{path: p.Path, file: f, size: p.Size}
		return true, p.readHeader(context.Background(), firstRead)
	}
	return false, guard([]*Part{p}, func() error { return p.parse(p.data) })
}

// mapping returns the bytes of the file that are mapped, if any are.
func (p *Part) mapping() mmap.MMap {
	if p.kept != nil {
		return p.kept
	}
	return p.data
}

// close unmaps the file or closes the source.
func (p *Part) close() error {
	if err := p.closeDescriptor(); err != nil {
		return err
	}
	switch {
	case p.source != nil:
		err := p.source.Close()
		if p.kept != nil {
			err = errors.Join(err, p.kept.Unmap())
		}
		return err
	case p.data != nil:
		return p.data.Unmap() // sets p.data to nil
	}
	return nil
}

// parse reads the header of a file of which data is the whole.
func (p *Part) parse(data []byte) error {
	p.Size = int64(len(data))
	return p.parseBeginning(data)
}

// parseBeginning reads the header of a file of p.Size bytes that begins with data. If data ends before the header does,
// the error wraps a *beginningError.
func (p *Part) parseBeginning(data []byte) error {
	h, err := scan(p.Path, data, p.Size, false)
	if err != nil {
		return err
	}
	if h.end > maxBytes {
		return &FormatError{Path: p.Path, Offset: int64(h.end), Err: fmt.Errorf(
			"a header of %d bytes, limit %d", h.end, maxBytes)}
	}
	// From here on a private copy is read, which does not change or vanish if another process writes to the file. It is
	// checked again, as the file may have changed between check and copy. What was read from a source is a copy already,
	// but too large a one if the header is short.
	own := data[:h.end:h.end]
	if p.source == nil && !p.view || p.source != nil && h.end < len(data)/2 {
		own = slices.Clone(own)
	}
	if h, err = scan(p.Path, own, int64(len(own)), true); err != nil {
		return err
	}
	p.header = unsafe.String(unsafe.SliceData(own), len(own)) // this process does not write to own any more
	p.Version, p.tensorInfo, p.infos, p.dims = h.version, h.tensorInfo, h.infos, h.dims
	if p.metadata, err = newMetadata(p.Path, p.header, h.keys); err != nil {
		return err
	}
	if err := p.setAlignment(); err != nil {
		return err
	}
	return p.setDataOffset()
}

// setDataOffset computes where the data section starts.
func (p *Part) setDataOffset() error {
	end := int64(len(p.header))
	start := pad(end, p.Alignment)
	p.DataOffset = min(start, p.Size)
	if p.infos > 0 && start > p.Size {
		return &FormatError{Path: p.Path, Offset: end, Err: fmt.Errorf(
			"%w: it ends before its data section, which starts at %#x", ErrTruncated, start)}
	}
	return nil
}

// setAlignment reads general.alignment.
func (p *Part) setAlignment() error {
	p.Alignment = defaultAlignment
	v, ok := p.metadata.Get(alignmentKey)
	if !ok {
		return nil
	}
	if v.Kind() != KindUint32 {
		return p.keyError(alignmentKey, "is of type %v, not uint32", v.Kind())
	}
	n, _ := v.Uint()
	if !legalAlignment(n) {
		return p.keyError(alignmentKey, "%d is not a power of two from 1 to %d", n, maxAlignment)
	}
	p.Alignment = uint32(n)
	return nil
}

func legalAlignment(n uint64) bool { return bits.OnesCount64(n) == 1 && n <= maxAlignment }

// keyError returns an error about the value of a key. It has no offset if the key is missing.
func (p *Part) keyError(key, format string, args ...any) error {
	at := int64(-1)
	if i, ok := p.metadata.index.find(key); ok {
		at = int64(p.metadata.pos[i])
	}
	return &FormatError{Path: p.Path, Offset: at, Field: key, Err: fmt.Errorf(format, args...)}
}

// pad rounds n up to a multiple of align, which must be a power of two.
func pad[T int64 | uint64](n T, align uint32) T { return (n + T(align) - 1) &^ (T(align) - 1) }
