package gguf

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"unsafe"

	"github.com/edsrzf/mmap-go"
)

const (
	alignmentKey     = "general.alignment"
	defaultAlignment = 32      // GGUF_DEFAULT_ALIGNMENT
	maxAlignment     = 1 << 30 // beyond all reason; keeps sums far from overflow
)

// Part is one file of a model; a model that is not split has one.
type Part struct {
	Path       string // as given to Open, or its neighbour in the same directory; of a Source, its own
	Version    uint32 // of the format: 2 or 3
	Size       int64  // of the file, in bytes
	Alignment  uint32 // of tensors, in bytes, relative to DataOffset
	DataOffset int64  // where the data section starts, in bytes

	metadata *Metadata
	header   string   // which metadata and names are slices of
	infos    []uint32 // where each tensor's record starts in it, and where the last ends
	tensors  []Tensor // by offset; a run of Model.tensors
	name     string   // without its directory
	file     *os.File
	data     mmap.MMap
	source   Source // instead of file and data
}

// File returns the open file, for reads that do not go through the mapping; nil for a part that is read from a [Source]. It is
// closed by [Model.Close]; its read position belongs to nobody, so use ReadAt.
func (p *Part) File() *os.File { return p.file }

// Bytes returns the mapping of the whole file, nil after [Model.Close] and for a part that is read from a [Source]. It must not
// be written to, is to be read inside [Model.Guard], and dies with Close.
func (p *Part) Bytes() []byte { return p.data }

// Metadata returns the metadata of this file alone.
func (p *Part) Metadata() *Metadata { return p.metadata }

// openPart opens and maps a file and reads its header. Nothing stays open when it fails.
func openPart(path string) (*Part, error) {
	// Before opening: opening a device can do things to it.
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if err := regular(path, info); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|openNonblock, 0)
	if err != nil {
		return nil, err
	}
	p := &Part{Path: path, name: filepath.Base(path), file: f}
	if err := p.load(); err != nil {
		return nil, errors.Join(err, p.close())
	}
	return p, nil
}

// regular refuses what cannot be mapped or never ends. A symbolic link has been followed: caches of models consist of them.
func regular(path string, info os.FileInfo) error {
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

// load maps the open file and reads its header.
func (p *Part) load() error {
	info, err := p.file.Stat()
	if err != nil {
		return err
	}
	if err := regular(p.Path, info); err != nil { // it may have been replaced since it was looked at
		return err
	}
	p.Size = info.Size()
	if p.Size == 0 { // which cannot be mapped
		return p.parse(nil)
	}
	if p.Size != int64(int(p.Size)) {
		return &FormatError{Path: p.Path, Offset: -1, Err: fmt.Errorf(
			"%w: %d bytes do not fit this machine's address space", ErrUnsupported, p.Size)}
	}
	p.data, err = mmap.MapRegion(p.file, int(p.Size), mmap.RDONLY, 0, 0)
	if err != nil {
		return &os.PathError{Op: "mmap", Path: p.Path, Err: err}
	}
	return guard([]*Part{p}, func() error { return p.parse(p.data) })
}

func (p *Part) close() error {
	if p.source != nil {
		return p.source.Close()
	}
	var unmap error
	if p.data != nil {
		unmap = p.data.Unmap() // sets p.data to nil
	}
	return errors.Join(unmap, p.file.Close())
}

// parse reads the header of a file of which data is the whole.
func (p *Part) parse(data []byte) error {
	p.Size = int64(len(data))
	return p.parseBeginning(data)
}

// parseBeginning reads the header of a file of p.Size bytes that begins with data. The error wraps a *beginningError if data
// ends before the header does.
func (p *Part) parseBeginning(data []byte) error {
	h, err := scan(p.Path, data, p.Size, false)
	if err != nil {
		return err
	}
	// From here on a private copy is read, which neither changes nor vanishes when another process writes to the file. It is
	// checked again, since the file may have changed in between.
	if h.end > maxBytes {
		return &FormatError{Path: p.Path, Offset: int64(h.end), Err: fmt.Errorf(
			"a header of %d bytes, limit %d", h.end, maxBytes)}
	}
	own := slices.Clone(data[:h.end])
	if h, err = scan(p.Path, own, int64(len(own)), true); err != nil {
		return err
	}
	p.header, p.infos = unsafe.String(unsafe.SliceData(own), len(own)), h.infos // own is written to no more
	p.Version = h.version
	if p.metadata, err = newMetadata(p.Path, p.header, h.keys); err != nil {
		return err
	}
	if err := p.setAlignment(); err != nil {
		return err
	}
	return p.setDataOffset()
}

// setDataOffset finds the beginning of the data section.
func (p *Part) setDataOffset() error {
	end := int64(p.infos[len(p.infos)-1])
	start := pad(end, p.Alignment)
	p.DataOffset = min(start, p.Size)
	if p.records() > 0 && start > p.Size {
		return &FormatError{Path: p.Path, Offset: end, Err: fmt.Errorf(
			"%w: it ends before its data section, which starts at %#x", ErrTruncated, start)}
	}
	return nil
}

// records is the number of the part's tensors.
func (p *Part) records() int { return len(p.infos) - 1 }

func (p *Part) setAlignment() error {
	p.Alignment = defaultAlignment
	v, ok := p.metadata.Get(alignmentKey)
	if !ok {
		return nil
	}
	if v.Kind() != Uint32 {
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

// keyError is about the value of a key; where the key is missing it has no place.
func (p *Part) keyError(key, format string, args ...any) error {
	at := int64(-1)
	if i, ok := p.metadata.index.find(key); ok {
		at = int64(p.metadata.pos[i])
	}
	return &FormatError{Path: p.Path, Offset: at, Field: key, Err: fmt.Errorf(format, args...)}
}

// pad rounds n up to a multiple of align, a power of two.
func pad[T int64 | uint64](n T, align uint32) T { return (n + T(align) - 1) &^ (T(align) - 1) }
