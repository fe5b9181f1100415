package loader

import (
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/kernels"
	"github.com/gguf2gpu/gguf2gpu/kernels/gpu"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/trace"
)

// defaultStall is how long a load may stand still before it is given up.
const defaultStall = 60 * time.Second

// Config says how a Loader works. The zero value suits the machine.
type Config struct {
	Streams int   // streams of each device that copies are spread over; 0: chosen
	Threads int   // workers that read and dequantize, for all devices together; 0: chosen from the number of cores
	Staging int64 // bytes of staging memory for all devices together, the bound on host memory; 0: chosen
	Chunk   int   // bytes of one copy; 0: chosen
	// Connections is how many ranges of a remote model are read at the same time, each by a worker of its own with a
	// staging buffer of its own; 0: 32. Threads is how many of them may convert at the same time.
	Connections int

	IO  IO          // how bytes come off the disk
	ISA kernels.ISA // dequantization kernels; kernels.Auto: GGUF2GPU_ISA, else the best that the CPU has

	// Dequant says who converts. On the device, blocks travel as they are in the file: fewer bytes than what they
	// become.
	Dequant Dequant
	// Compiler makes the device's kernels. Nil: those that an earlier process left in the user's cache are used, and
	// nothing is compiled; see package kernels/gpu for how to compile.
	Compiler *gpu.Compiler

	// Stall is how long a load may make no progress at all before it is given up with ErrStalled; 0: one minute. After
	// a third of it the log says what the load waits for.
	Stall  time.Duration
	Logger *slog.Logger // nil: silent

	turns bool // groups take turns; see turns.go

	// DequantAuto takes the device whatever it is and saves; for tests.
	autoAlways bool
	autoProve  bool                                               // likewise, of ProveAuto
	readAt     func(f *os.File, b []byte, off int64) (int, error) // nil: (*os.File).ReadAt; others are for tests
}

// Request says what is wanted of one load besides its plan.
type Request struct {
	// Check looks at the bytes of the file on their way. An element that is not a finite number, or would not be one as
	// what it is converted to, fails the load with a *ValueError.
	Check bool
	// Hash computes the hash of each tensor's bytes in the file on their way, with HashWith; see [Model.Hashes]. With
	// SHA256 the chunks of a tensor go through one worker, so that a large tensor is hashed no faster than by one thread.
	Hash     bool
	HashWith HashAlgorithm
	// Prove compares fingerprints of what the devices have got with those of what was sent to them. A difference fails
	// the load with a *ProveError when everything has arrived; tensors that have been waited for may have been used by
	// then. See [Model.Fingerprints].
	Prove Prove
	// Share takes device memory that other processes can open; see package loader/hold. After a failed load such memory
	// is freed by Close and not before, as others may have it mapped.
	Share bool
	// Allocate takes the place of the usual device memory: it returns n bytes, or a little more, for allocation number
	// i of the device with this number in the plan. Closing Mapping.Memory frees them. It may be called in another
	// goroutine, and after the load has failed; see package loader/hold. Nil: memory is allocated as usual.
	Allocate func(device, i int, n uint64) (Mapping, error)
	// Keep is filled with the file's bytes on their way, see AwaitImage; nil: nothing is.
	Keep *Image
	// Progress is called when bytes of tensors have arrived, with the sum so far and the total. Calls do not overlap, the
	// sum never falls, and calls must return quickly.
	Progress func(done, total int64)
	Trace    *trace.Trace // receives the timeline; nil: none
}

// IO says how bytes come off the disk.
type IO uint8

// The ways of reading. IOAuto takes, for every extent of the file, the mapping where its pages are in the page cache
// already and direct reads where they are not. Where direct reads do not work it takes ordinary ones, and where the
// file cannot be opened any more the mapping; the log says so once. The others fail where they do not work.
const (
	IOAuto   = IO(read.Auto)
	IOMapped = IO(read.Mapped) // a read-only mapping, through the page cache
	IODirect = IO(read.Direct) // direct reads, past the page cache; on systems other than Linux ordinary reads
)

var ioNames = []string{IOAuto: "auto", IOMapped: "mmap", IODirect: "direct"}

// String returns "auto", "mmap" or "direct".
func (o IO) String() string { return nameOf(o, ioNames) }

// UnmarshalText sets the way of reading from its name.
func (o *IO) UnmarshalText(text []byte) (err error) {
	*o, err = parseName[IO](text, ioNames, "io")
	return err
}

// Dequant says who converts tensors to another type.
type Dequant uint8

// Who converts. DequantAuto lets the device do it where that moves fewer bytes, if kernels are there or can be compiled
// and enough bytes are saved; when something about that fails, the CPU converts, and one warning says why. DequantGPU
// makes the device convert whatever it has a kernel for, and fails where it cannot.
const (
	DequantAuto Dequant = iota
	DequantCPU
	DequantGPU
)

var dequantNames = []string{DequantAuto: "auto", DequantCPU: "cpu", DequantGPU: "gpu"}

// String returns "auto", "cpu" or "gpu".
func (d Dequant) String() string { return nameOf(d, dequantNames) }

// UnmarshalText sets the choice from its name.
func (d *Dequant) UnmarshalText(text []byte) (err error) {
	*d, err = parseName[Dequant](text, dequantNames, "dequant")
	return err
}

func nameOf[E ~uint8](e E, names []string) string {
	if int(e) >= len(names) {
		return fmt.Sprintf("number %d", uint8(e))
	}
	return names[e]
}

func parseName[E ~uint8](text []byte, names []string, kind string) (E, error) {
	if i := slices.Index(names, strings.ToLower(string(text))); i >= 0 {
		return E(i), nil
	}
	return 0, fmt.Errorf("unknown %s %q: use %s", kind, text, strings.Join(names, ", "))
}

// forFile is c for loads of f. A file that comes once and in order has one reader. Where ranges have to be short,
// chunks are, too, as a request asks for at least one of them, and groups take turns.
func (c Config) forFile(f *gguf.File) Config {
	r := f.Reading()
	if r.Once {
		c.Connections = 1
	}
	c.turns = r.MaxRange > 0 || r.Once
	if short := int(min(r.MaxRange, defaultChunk)); short >= minChunk && c.Chunk == 0 && (c.Staging == 0 ||
		c.Staging >= 2*int64(short)) {
		c.Chunk = short
	}
	return c
}

// Check refuses what makes no sense on any device. [New] does so, too. The error matches ErrBadOption.
func (c Config) Check() error {
	_, err := c.check()
	return err
}

// check refuses what makes no sense, and fills what is open and no size. Sizes are decided by sizesOf.
func (c Config) check() (Config, error) {
	switch {
	case c.Streams < 0 || c.Streams > 256:
		return c, fmt.Errorf("%w: Streams is %d: use 1 to 256, or 0 for the default", ErrBadOption, c.Streams)
	case c.Threads < 0 || c.Threads > 1024:
		return c, fmt.Errorf("%w: Threads is %d: use 1 to 1024, or 0 for the default", ErrBadOption, c.Threads)
	case c.Connections < 0 || c.Connections > 256:
		return c, fmt.Errorf("%w: Connections is %d: use 1 to 256, or 0 for the default", ErrBadOption, c.Connections)
	case c.Chunk != 0 && (c.Chunk < minChunk || c.Chunk > 1<<30):
		return c, fmt.Errorf("%w: Chunk is %d bytes: use 64 KiB to 1 GiB, or 0 for the default", ErrBadOption, c.Chunk)
	case c.Staging < 0 || c.Staging > 0 && c.Staging < minChunk:
		return c, fmt.Errorf("%w: Staging is %d bytes: use at least 64 KiB, or 0 for the default", ErrBadOption, c.Staging)
	case c.Staging > 0 && c.Staging < int64(c.Chunk):
		return c, fmt.Errorf("%w: Chunk is %d bytes, which do not fit Staging, %d bytes", ErrBadOption, c.Chunk, c.Staging)
	case c.Stall < 0:
		return c, fmt.Errorf("%w: Stall is %v: use a positive time, or 0 for the default", ErrBadOption, c.Stall)
	case int(c.IO) >= len(ioNames):
		return c, fmt.Errorf("%w: there is no IO number %d", ErrBadOption, uint8(c.IO))
	case int(c.Dequant) >= len(dequantNames):
		return c, fmt.Errorf("%w: there is no Dequant number %d", ErrBadOption, uint8(c.Dequant))
	}
	if c.Stall == 0 {
		c.Stall = defaultStall
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}
