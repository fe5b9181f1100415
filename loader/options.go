package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"runtime"
	"time"

	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
)

// IO says how bytes come off the disk.
type IO uint8

// The ways of reading. IOAuto takes, for every extent of the file, the mapping where its pages are in the page cache
// already and direct reads where they are not.
const (
	IOAuto   IO = iota
	IOMapped    // a read-only mapping, through the page cache
	IODirect    // direct reads, past the page cache, into aligned buffers; ordinary reads where a file system has no direct ones
)

var ioNames = [...]string{IOAuto: "auto", IOMapped: "mmap", IODirect: "direct"}

// String returns the name that ParseIO takes.
func (o IO) String() string { return nameOf(o, ioNames[:], "io") }

// ParseIO returns the way of reading of that name: "auto", "mmap" or "direct".
func ParseIO(s string) (IO, error) { return parseName[IO](s, ioNames[:], "way of reading") }

const (
	// maxDefaultThreads bounds the default number of workers. Twelve fill any link of today; more have more buffers under way
	// than fit a cache, and were slower.
	maxDefaultThreads = 12
	// defaultStreams: copies in one direction take turns on the link, so a second stream only hides the gap between two
	// copies, and more make no difference.
	defaultStreams = 2
	// defaultChunk is the size of a copy from which on the gaps between copies cost little; see loader/README.md.
	defaultChunk = 4 << 20
	// flyingBuffers is how many buffers may be on their way to the device while every worker fills one.
	flyingBuffers = 8
	// largeLoad is the number of device bytes from which on a load is worth larger chunks.
	largeLoad = 4 << 30
	// minDefaultStaging is the default staging memory on machines with few cores.
	minDefaultStaging = 64 << 20
	// maxDefaultStaging bounds the default staging memory on machines with many cores.
	maxDefaultStaging = 128 << 20
	// defaultStall is how long a load may stand still before it is given up.
	defaultStall = 60 * time.Second
)

// Options describes a load. The zero value loads all tensors as F16 with a pipeline that suits the machine.
type Options struct {
	DType   DType          // what tensors are converted to
	Rules   []Rule         // exceptions by tensor name; the first that matches wins
	Tensors *regexp.Regexp // only the tensors whose names match; nil: all
	Shard   Shard          // of these, the part that one of several ranks loads

	Streams int         // streams that copies are spread over; 0: chosen
	Threads int         // workers that read and dequantize; 0: chosen from the number of cores
	Staging int64       // bytes of staging memory, the bound on host memory; 0: chosen
	Chunk   int         // bytes of one copy; 0: 4 MiB
	IO      IO          // how bytes come off the disk
	ISA     kernels.ISA // dequantization kernels; kernels.Auto: GGUF2GPU_ISA, else the best that the CPU has

	// Connections is how many ranges of a remote model are read at the same time, each by a worker of its own with a staging buffer
	// of its own, so that there are no more than staging buffers; 0: 32. Threads is how many of them may convert at the same time.
	Connections int

	// Dequant says who converts. On the device, blocks travel as they are in the file: fewer bytes than what they become.
	Dequant Dequant
	// Compiler makes the device's kernels. Nil: in this process, which package gpu explains the risk of, and with a cache in
	// the user's directory for such files.
	Compiler *gpu.Compiler

	// Stall is how long a load may make no progress at all before it is given up with ErrStalled; 0: one minute. A third
	// of it is when the log says what the load waits for.
	Stall time.Duration

	// Check looks at the bytes of the file on their way. An element that is not a finite number, or would not be one as what it
	// is converted to, fails the load with a *ValueError.
	Check bool
	// Hash computes the SHA-256 of each tensor's bytes in the file on their way; see [Model.Hashes]. The chunks of a tensor then
	// go through one worker, so that it is the workers' number times what a core hashes that bounds the speed.
	Hash bool

	// Progress is called whenever bytes have arrived on the device, with the sum so far and the total. Calls do not overlap
	// and must return quickly.
	Progress func(done, total int64)
	Trace    *Trace       // receives the pipeline's timeline; nil: none
	Logger   *slog.Logger // nil: silent

	defaultStreams bool                                               // Streams was left open
	autoAlways     bool                                               // DequantAuto chooses the device whatever it is and saves; for tests
	exported       bool                                               // device memory is such that other processes can open it
	readAt         func(f *os.File, b []byte, off int64) (int, error) // nil: (*os.File).ReadAt; others are for tests
}

// ErrBadOption is matched by the errors that refuse an Options field.
var ErrBadOption = errors.New("loader: bad option")

// withDefaults fills what is left open and refuses what makes no sense.
func (o Options) withDefaults() (Options, error) {
	switch {
	case o.Streams < 0 || o.Streams > 256:
		return o, fmt.Errorf("%w: %d streams: use 1 to 256, or 0 for the default", ErrBadOption, o.Streams)
	case o.Threads < 0 || o.Threads > 1024:
		return o, fmt.Errorf("%w: %d threads: use 1 to 1024, or 0 for the default", ErrBadOption, o.Threads)
	case o.Connections < 0 || o.Connections > 256:
		return o, fmt.Errorf("%w: %d connections: use 1 to 256, or 0 for the default", ErrBadOption, o.Connections)
	case o.Chunk != 0 && (o.Chunk < minChunk || o.Chunk > 1<<30):
		return o, fmt.Errorf("%w: chunks of %d bytes: use 64 KiB to 1 GiB, or 0 for the default", ErrBadOption, o.Chunk)
	case o.Stall < 0:
		return o, fmt.Errorf("%w: giving up after %v: use a positive time, or 0 for the default", ErrBadOption, o.Stall)
	case o.Staging < 0 || o.Staging > 0 && o.Staging < minChunk:
		return o, fmt.Errorf("%w: %d bytes of staging memory: use at least 64 KiB, or 0 for the default", ErrBadOption, o.Staging)
	}
	var err error
	if o.Shard, err = o.Shard.withDefaults(); err != nil {
		return o, err
	}
	if o.Threads == 0 {
		o.Threads = min(runtime.GOMAXPROCS(0), maxDefaultThreads)
	}
	if o.Connections == 0 {
		o.Connections = DefaultConnections
	}
	if o.Streams == 0 {
		o.Streams, o.defaultStreams = defaultStreams, true
	}
	switch {
	case o.Chunk == 0 && o.Staging > 0: // at least two chunks, so that filling and copying overlap
		o.Chunk = max(minChunk, min(defaultChunk, int(o.Staging/2)))
	case o.Chunk == 0:
		o.Chunk = defaultChunk
	}
	if o.Staging == 0 {
		o.Staging = max(defaultStaging(o.Threads, o.Chunk), 2*int64(o.Chunk))
	}
	if o.Staging < int64(o.Chunk) {
		return o, fmt.Errorf("%w: chunks of %d bytes do not fit %d bytes of staging memory", ErrBadOption, o.Chunk, o.Staging)
	}
	if o.Stall == 0 {
		o.Stall = defaultStall
	}
	if o.readAt == nil {
		o.readAt = (*os.File).ReadAt
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

// defaultStaging is a buffer for every worker to fill, and some for the link to drain.
func defaultStaging(threads, chunk int) int64 {
	return max(minDefaultStaging, min(maxDefaultStaging, int64(threads+flyingBuffers)*int64(chunk)))
}

// grow doubles the chunks of a large load in which the CPU converts most bytes, where o, as the caller gave it, leaves them
// open. Larger copies use the link better by a few per cent. Raw loads are bound by the workers, who copy as much as the link
// does, and lose more by having fewer buffers than they gain.
func (p *Plan) grow(o Options) {
	if o.Chunk != 0 || o.Staging != 0 || p.DeviceBytes < largeLoad || p.model.Remote() {
		return
	}
	var raw uint64
	for i := range p.Tensors {
		if t := &p.Tensors[i]; t.Target == t.Type || t.expand {
			raw += t.Bytes
		}
	}
	if raw < p.DeviceBytes/2 {
		p.opts.Chunk = 2 * defaultChunk
		p.opts.Staging = defaultStaging(p.opts.Threads, p.opts.Chunk)
	}
}
