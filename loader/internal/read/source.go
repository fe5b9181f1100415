package read

import (
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/trace"
)

const (
	// windowBytes is the unit in which a file's pages are asked for, examined and let go: large enough that the system
	// calls do not count, small enough that the few windows in use at a time do not either.
	windowBytes = 8 << 20
	// directAlign is the alignment that direct reads need of offset, length and memory: the page size of common file
	// systems.
	directAlign = 4096
	// maxGap is how many bytes that nobody wants are read along to save a read.
	maxGap = 64 << 10
	// enoughResident is the share of a window's pages that must be in the page cache for the mapping to be used: a few
	// pages that are not there are cheaper to wait for than all the others to read again.
	enoughResident = 0.9
)

// Mode says how bytes come off the disk.
type Mode uint8

// The modes. Auto takes, for every window of the file, the mapping where its pages are in the page cache already and
// direct reads where they are not. Where one of these does not work it takes ordinary reads, or what else works; see
// [Fallback]. The other modes fail where they do not work.
const (
	Auto   Mode = iota
	Mapped      // a read-only mapping, through the page cache
	Direct      // direct reads, past the page cache
)

// Sink takes the bytes of segments. It belongs to one worker. An error that it returns ends the read and reaches the
// caller as it is.
type Sink interface {
	// Put takes all bytes of a segment at once. They are valid during the call only.
	Put(s *plan.Segment, src []byte) error
	// AsIs reports whether the device's bytes of a segment are those of the file, so that they may be read straight
	// into its room.
	AsIs(s *plan.Segment) bool
	// Room returns where the device's bytes of a segment go. A segment whose room was asked for is not put, and
	// segments come in order.
	Room(s *plan.Segment) ([]byte, error)
	// PutPart takes a part of a segment's bytes, whole blocks that begin at byte at of the tensor, whose place in the
	// room is dst. Bytes that have been read straight into the room have the same dst and src.
	PutPart(s *plan.Segment, at int64, dst, src []byte) error
	// Looks reports whether PutPart has anything to do with bytes that are in their room already.
	Looks() bool
	// Flush ends a chunk: what the sink has kept back goes to its place.
	Flush() error
}

// Options says how a source reads.
type Options struct {
	Mode        Mode
	Threads     int          // of a remote model: how many workers may convert at the same time
	Connections int          // of a remote model: how many ranges are read at the same time
	Trace       *trace.Trace // receives reads; nil: none
	// Fallback is told, once, that a file cannot be read in the way that Auto prefers; nil: nobody is.
	Fallback func(Fallback)
	// ReadAt is called instead of what reads; nil: it is not. Tests let reads fail with it.
	ReadAt func(f *os.File, b []byte, off int64) (int, error)
}

// Source gives the bytes of a group's tensors to workers.
type Source struct {
	file       *gguf.File
	group      *plan.Group
	o          Options
	parts      []*part
	converting chan struct{} // of remote parts: a semaphore for those who work on what has come
	maxRange   int64         // of remote parts: the most that one request asks for

	told sync.Once // that there was a fallback

	mapped, direct, plain, remote, fetched atomic.Int64
}

// Stats counts bytes that came.
type Stats struct {
	Mapped  int64 // through the mapping
	Direct  int64 // by direct reads
	Plain   int64 // by ordinary reads
	Remote  int64 // from a server, or from a file that cannot be mapped
	Fetched int64 // by direct and ordinary reads: with what lies between pieces, and around what is not aligned
}

// Stats returns what has come so far.
func (s *Source) Stats() Stats {
	return Stats{s.mapped.Load(), s.direct.Load(), s.plain.Load(), s.remote.Load(), s.fetched.Load()}
}

// part is one file of the model.
type part struct {
	*gguf.Part
	bytes   []byte      // the mapping
	plain   descriptor  // for reads through the page cache
	direct  descriptor  // for reads past it
	remote  gguf.Source // instead of all that; else nil
	windows []window
	left    atomic.Int64 // segments that are still to be read

	probe    descriptor  // for asking which pages are in the page cache
	noProbe  atomic.Bool // that cannot be asked by reading
	noDirect atomic.Bool // direct reads do not work
	noRooms  atomic.Bool // direct reads into the memory of rooms do not work
}

// descriptor opens a part when it is first read, and closes it when nothing of it is left to read: a model may have
// more parts than a process may have open files.
type descriptor struct {
	open func() (*os.File, error)
	mu   sync.Mutex
	file *os.File
	mem  int // alignment of memory that direct reads from file need
}

func (d *descriptor) get() (*os.File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.file == nil {
		var err error
		if d.file, err = d.open(); err != nil {
			return nil, err
		}
		d.mem = memoryAlign(d.file)
	}
	return d.file, nil
}

func (d *descriptor) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.file != nil {
		d.file.Close()
		d.file = nil
	}
}

// window is windowBytes of a part.
type window struct {
	left      atomic.Int32 // segments in it that are still to be read
	transport atomic.Uint32
}

// What brings the bytes of a window.
const (
	undecided = iota
	byMapping
	byDirectRead
	byRange // of every window of a remote part
)

// local reports whether the part is a file of this system.
func (p *part) local() bool { return p.Info() != nil }

// Open prepares reading the segments of chunks of the group g. The caller must Close the result.
func Open(f *gguf.File, g *plan.Group, chunks []plan.Chunk, o Options) (*Source, error) {
	s := &Source{file: f, group: g, o: o, maxRange: maxRange}
	if n := f.Reading().MaxRange; n > 0 {
		s.maxRange = min(n, maxRange)
	}
	s.converting = make(chan struct{}, max(1, o.Threads)) // parts of one model may differ in what they are read from
	for _, p := range f.Parts() {
		ps := part{Part: p, bytes: p.Bytes(), remote: p.Source()}
		if err := s.unmapped(&ps); err != nil {
			return nil, err
		}
		if ps.remote == nil {
			ps.windows = make([]window, (p.Size+windowBytes-1)/windowBytes)
		}
		ps.plain.open = func() (*os.File, error) { return p.Open(0) }
		ps.direct.open = func() (*os.File, error) { return OpenDirect(p) }
		ps.probe.open = func() (*os.File, error) { return openProbe(p) }
		s.parts = append(s.parts, &ps)
	}
	for i := range chunks {
		for j := range chunks[i].Segs {
			ps, lo, hi := s.extent(&chunks[i].Segs[j])
			ps.left.Add(1)
			for w := lo / windowBytes; w <= (hi-1)/windowBytes && ps.remote == nil; w++ {
				ps.windows[w].left.Add(1)
			}
		}
	}
	return s, nil
}

// Close closes the files that are open still. Nobody may be reading.
func (s *Source) Close() {
	for _, p := range s.parts {
		p.close()
	}
}

func (p *part) close() {
	p.plain.close()
	p.direct.close()
	p.probe.close()
}

// extent is the part and the byte range in it that a segment covers. A segment of a slice may have only some of these
// bytes.
func (s *Source) extent(seg *plan.Segment) (ps *part, lo, hi int64) {
	t := &s.group.Tensors[seg.Tensor]
	lo, hi = t.Span(seg.Src, int64(seg.SrcBytes))
	return s.parts[t.Part], lo, hi
}

// transport returns what brings the bytes at lo. It decides once for every window, when the first worker comes to it.
func (s *Source) transport(ps *part, lo int64) uint32 {
	if ps.remote != nil {
		return byRange
	}
	w := lo / windowBytes
	win := &ps.windows[w]
	decided := win.transport.Load()
	if decided != undecided {
		return decided
	}
	decided = byDirectRead
	switch s.o.Mode {
	case Mapped:
		decided = byMapping
	case Auto:
		if ps.resident(w) {
			decided = byMapping
		}
	}
	if !win.transport.CompareAndSwap(undecided, decided) {
		return win.transport.Load() // another worker was first
	}
	return decided
}

// window is the mapping of window number w.
func (p *part) window(w int64) []byte {
	return p.bytes[w*windowBytes : min((w+1)*windowBytes, int64(len(p.bytes)))]
}

// consumed lets go of the windows of the mapping that no segment needs any more.
func (s *Source) consumed(seg *plan.Segment) {
	ps, lo, hi := s.extent(seg)
	for w := lo / windowBytes; w <= (hi-1)/windowBytes && ps.remote == nil; w++ {
		if ps.windows[w].left.Add(-1) == 0 && ps.windows[w].transport.Load() != byDirectRead {
			letGo(ps.window(w))
		}
	}
	if ps.left.Add(-1) == 0 {
		ps.close()
	}
}

// AlignedBytes returns n bytes on a page boundary, as direct reads need.
func AlignedBytes(n int) []byte {
	b := make([]byte, n+directAlign)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (directAlign - 1)
	return b[skip : skip+uintptr(n) : skip+uintptr(n)]
}
