package gpu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
)

// NoCache as Compiler.Dir means that compiled kernels are not kept.
const NoCache = "off"

// ErrNotCompiled is matched by the error of Load for a kernel that is not in the cache, if the Compiler may not compile
// it: it has no Run, and is not InProcess.
var ErrNotCompiled = errors.New("the kernel is not in the cache, and the compiler may not run: " +
	"set Compiler.Run to compile in another process (see gpu.Child), or Compiler.InProcess")

// Compiler compiles kernels to code objects and caches those in files. The zero value compiles nothing: on a GPU it
// only uses kernels that are in the cache already. A Compiler is safe for concurrent use, and several processes may use
// one directory.
type Compiler struct {
	// Dir is the directory of the cache. "" is gguf2gpu/kernels in the user's cache directory, NoCache is no cache. On
	// the software device, whose code objects are worth nothing, "" is NoCache too. If the directory cannot be written,
	// Load logs a warning and goes on.
	Dir string
	// Run compiles a kernel that is not in the cache, outside of this process; see [Child]. Load calls it for several
	// kernels at the same time.
	Run func(ctx context.Context, r Request) ([]byte, error)
	// InProcess lets Load compile in this process, one kernel after the other, if Run is nil. SOME VERSIONS OF AMD'S
	// COMPILER END THE PROCESS (SIGABRT) for an architecture that they do not know.
	InProcess bool
	// Logger gets what was compiled and which cache entries were of no use (debug level), and a warning if the cache
	// cannot be written. Nil: silent.
	Logger *slog.Logger
}

// The software device ignores Run and InProcess: compiling for it is safe, and must happen in this process, which has
// the Go functions that stand in for kernels.

// Request is what Compiler.Run is asked to compile. It can be sent to another process as JSON.
type Request struct {
	Library string   `json:"library"` // path of the HIP library, from Runtime.Library
	Name    string   `json:"name"`    // of the program, for the compiler's messages
	Source  string   `json:"source"`
	Options []string `json:"options"`
}

// Compile compiles r in this process and returns the code object. It needs no GPU, and finds hipRTC as amdhip does.
// Errors: those of amdhip.Open and of Runtime.Compile.
func (r Request) Compile() (code []byte, err error) {
	rt, err := amdhip.Open(amdhip.Options{Library: r.Library})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rt.Close()) }()
	return rt.Compile(r.Name, r.Source, r.Options...)
}

// Stats says what Load did.
type Stats struct {
	Compiled, Cached int           // number of kernels
	Compiling        time.Duration // searching the cache, and compiling
	Loading          time.Duration // loading the code onto the device, and checking the kernels
}

// stallTime is how long calls of HIP may make no progress, unless the context carries another limit.
const stallTime = time.Minute

// maxRuns bounds how many calls of Run there are at a time.
const maxRuns = 4

// Load gets kernels ready on dev: it takes each from the cache or compiles it, loads it, and checks it against the CPU.
// It returns early when ctx ends, but not before a compilation in this process that has begun is over.
//
// Errors: *amdhip.CompilerError if there is no hipRTC, *amdhip.CompileError, *amdhip.Error, *CheckError for a kernel
// whose numbers are not those of the CPU, ErrNotCompiled, amdhip.ErrUnsupported for a kernel that does not exist or a
// device of unknown architecture, what Run returns, and the cause of ctx's end.
//
// A call of HIP that does not return within a minute is given up. If such a call or a kernel hangs, Load frees nothing
// that the device may still use. Otherwise it frees the memory that it needed,
// for which HIP waits until the device has finished all its work.
func (c *Compiler) Load(ctx context.Context, dev *amdhip.Device, keys []Key) (*Set, error) {
	keys, err := distinct(keys)
	if err != nil {
		return nil, err
	}
	limit := watch.From(ctx, stallTime)
	b, err := watch.Do(ctx, limit, "asking for the compiler of kernels", func() (*build, error) { return c.begin(dev) }, func(*build) {})
	if err != nil {
		return nil, err
	}
	if s, ok := dev.Runtime().Backend().(amdhip.StandIns); ok {
		offer(s, keys)
	}
	start := time.Now()
	codes, err := b.codes(ctx, keys)
	if err != nil {
		return nil, err
	}
	compiled := time.Now()
	s := &Set{dev: dev, kernels: make(map[Key]kernel, len(keys))}
	for i, k := range keys {
		if err := b.load(ctx, limit, s, k, codes[i]); err != nil {
			return nil, errors.Join(fmt.Errorf("gpu: kernel %v: %w", k, err), s.unload(limit))
		}
	}
	if err := s.check(ctx, limit, keys); err != nil {
		return nil, errors.Join(err, s.unload(limit))
	}
	n := int(b.compiled.Load())
	s.stats = Stats{Compiled: n, Cached: len(keys) - n, Compiling: compiled.Sub(start), Loading: time.Since(compiled)}
	b.Logger.Debug("kernels are ready", "compiled", n, "cached", s.stats.Cached, "compiling", s.stats.Compiling,
		"loading", s.stats.Loading)
	return s, nil
}

// distinct returns keys without repetitions.
func distinct(keys []Key) (all []Key, err error) {
	for _, k := range keys {
		if !k.exists() {
			return nil, fmt.Errorf("gpu: there is no kernel %v: %w", k, amdhip.ErrUnsupported)
		}
		if !slices.Contains(all, k) {
			all = append(all, k)
		}
	}
	return all, nil
}

// build is one call of Load: the compiler, and what it compiles for.
type build struct {
	Compiler
	dev             *amdhip.Device
	options         []string
	hiprtc          string       // path of the compiler's library
	version, driver int          // of HIP
	compiled        atomic.Int64 // number of kernels
	warned          atomic.Bool  // that the cache cannot be written
}

// begin finds the device's architecture, the compiler and the cache.
func (c *Compiler) begin(dev *amdhip.Device) (*build, error) {
	if dev.Arch() == "" {
		return nil, fmt.Errorf("gpu: the architecture of device %d (%s) is unknown, so nothing can be compiled for it: %w",
			dev.Index(), dev.Name(), amdhip.ErrUnsupported)
	}
	b := &build{Compiler: *c, dev: dev, options: options(dev.Arch())}
	if b.Logger == nil {
		b.Logger = slog.New(slog.DiscardHandler)
	}
	rt := dev.Runtime()
	var err error
	if b.hiprtc, err = rt.Compiler(); err != nil {
		return nil, err
	}
	if b.version, b.driver, err = rt.Version(); err != nil {
		return nil, err
	}
	if _, ok := rt.Backend().(amdhip.StandIns); ok {
		b.Run, b.InProcess = nil, true
		if b.Dir == "" {
			b.Dir = NoCache
		}
	}
	b.openCache()
	return b, nil
}

// options returns the compiler's options for an architecture.
func options(arch string) []string { return []string{"--gpu-architecture=" + arch, "-std=c++17"} }

// code is the code object of a kernel.
type code struct {
	object []byte
	cached bool // it came from the cache
}

// codes returns the code objects of keys, in their order. It works on several at a time.
func (b *build) codes(ctx context.Context, keys []Key) ([]code, error) {
	codes := make([]code, len(keys))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(min(maxRuns, runtime.GOMAXPROCS(0)))
	for i, k := range keys {
		group.Go(func() (err error) {
			codes[i], err = b.code(ctx, k)
			return err
		})
	}
	return codes, group.Wait()
}

// code takes the code object of k from the cache, or compiles it.
func (b *build) code(ctx context.Context, k Key) (code, error) {
	if ctx.Err() != nil {
		return code{}, context.Cause(ctx)
	}
	r := b.request(k)
	if object := b.read(b.entry(r)); object != nil {
		return code{object, true}, nil
	}
	object, err := b.compile(ctx, k, r)
	return code{object: object}, err
}

// request returns what a compiler has to know to compile k.
func (b *build) request(k Key) Request {
	return Request{Library: b.dev.Runtime().Library(), Name: k.Name(), Source: k.Source(), Options: b.options}
}

// inProcess is held during a compilation in this process. hipRTC runs only one at a time anyway, and older versions of
// the compiler that it calls are not safe for concurrent use.
var inProcess sync.Mutex

// compile compiles k and puts the code object into the cache.
func (b *build) compile(ctx context.Context, k Key, r Request) (object []byte, err error) {
	run := b.Run
	switch {
	case run != nil:
	case b.InProcess:
		run = b.compileInProcess
	default:
		return nil, fmt.Errorf("gpu: kernel %v for %s: %w", k, b.dev.Arch(), ErrNotCompiled)
	}
	start := time.Now()
	if object, err = run(ctx, r); err != nil {
		return nil, fmt.Errorf("gpu: compiling %v for %s: %w", k, b.dev.Arch(), err)
	}
	b.compiled.Add(1)
	b.Logger.Debug("compiled a kernel",
		"kernel", k, "arch", b.dev.Arch(), "bytes", len(object), "took", time.Since(start))
	b.write(b.entry(r), object)
	return object, nil
}

// compileInProcess is the Run of compilers that are InProcess.
func (b *build) compileInProcess(ctx context.Context, r Request) ([]byte, error) {
	inProcess.Lock()
	defer inProcess.Unlock()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return b.dev.Runtime().Compile(r.Name, r.Source, r.Options...)
}

// load loads the code object of k onto the device and adds the kernel to s. If the device refuses a code object from
// the cache, load compiles the kernel again.
func (b *build) load(ctx context.Context, limit *watch.Limit, s *Set, k Key, c code) error {
	loaded, err := b.module(ctx, limit, k, c.object)
	if err != nil && c.cached && !watch.Lost(err) {
		b.Logger.Debug("the device refuses a kernel from the cache", "kernel", k, "error", err)
		object, again := b.compile(ctx, k, b.request(k))
		if again != nil {
			return errors.Join(err, again)
		}
		loaded, err = b.module(ctx, limit, k, object)
	}
	if err == nil {
		s.kernels[k] = loaded
	}
	return err
}

// module loads the code object of k, and finds the kernel in it.
func (b *build) module(ctx context.Context, limit *watch.Limit, k Key, object []byte) (kernel, error) {
	return watch.Do(ctx, limit, "loading a kernel", func() (kernel, error) {
		m, err := b.dev.LoadModule(object)
		if err != nil {
			return kernel{}, err
		}
		f, err := m.Function(k.Name())
		if err != nil {
			return kernel{}, errors.Join(err, m.Close())
		}
		return kernel{m, f}, nil
	}, func(x kernel) { _ = x.module.Close() })
}
