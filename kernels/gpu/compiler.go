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
)

// NoCache as the directory of a Compiler means that nothing is kept.
const NoCache = "off"

// Compiler makes code objects of kernels, and keeps them in files. The zero value is useful; the package documentation says what
// is risky about it. A Compiler is safe for concurrent use, and so is a directory that several processes use.
type Compiler struct {
	// Dir is where code objects are kept; "": gguf2gpu/kernels in the user's cache directory, NoCache: nowhere. On the software
	// device, whose code is worth nothing, "" is NoCache. A directory that cannot be written is no error.
	Dir string
	// Run compiles what is not in the cache, elsewhere than in this process. It is called for several kernels at a time. Nil: in
	// this process, one after the other. The software device is always compiled for in this process, which has what stands in
	// for kernels.
	Run func(ctx context.Context, r Request) ([]byte, error)
	// Logger is told what was compiled and why an entry of the cache was of no use, at debug level, and warned when nothing can
	// be kept; nil: silent.
	Logger *slog.Logger
}

// Request is a compilation to be done, by another process perhaps.
type Request struct {
	Library string   `json:"library"` // HIP's, as Runtime.Library tells
	Name    string   `json:"name"`    // of the program
	Source  string   `json:"source"`
	Options []string `json:"options"`
}

// Compile does what r asks for, in this process. It needs no GPU, and finds hipRTC as amdhip does.
func (r Request) Compile() (code []byte, err error) {
	rt, err := amdhip.Open(amdhip.Options{Library: r.Library})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rt.Close()) }()
	return rt.Compile(r.Name, r.Source, r.Options...)
}

// Stats says what Load had to do.
type Stats struct {
	Compiled, Cached int           // kernels
	Compiling        time.Duration // looking in the cache, and compiling
	Loading          time.Duration // loading and checking
}

// maxRuns bounds the compilations that Run is asked for at a time.
const maxRuns = 4

// Load gets kernels ready on dev: from the cache or by compiling them, and then checks each of them. It ends early when ctx does,
// once a compilation in this process that has begun is over. Errors: *amdhip.CompilerError without hipRTC,
// *amdhip.CompileError, *amdhip.Error, *CheckError for a kernel that gives other numbers than the CPU, one matching
// amdhip.ErrUnsupported for a kernel that does not exist or a device of unknown architecture, what Run returns, and the cause of
// ctx's end. If the kernels hang, what the device may still use is not freed. At its end Load frees memory of its own, for which
// HIP waits until the device has done all that it is doing.
func (c *Compiler) Load(ctx context.Context, dev *amdhip.Device, keys []Key) (*Set, error) {
	keys, err := distinct(keys)
	if err != nil {
		return nil, err
	}
	b, err := c.begin(dev)
	if err != nil {
		return nil, err
	}
	if sw := dev.Runtime().Software(); sw != nil {
		offer(sw, keys)
	}
	start := time.Now()
	codes, err := b.codes(ctx, keys)
	if err != nil {
		return nil, err
	}
	compiled := time.Now()
	s := &Set{dev: dev, kernels: make(map[Key]kernel, len(keys))}
	for i, k := range keys {
		if err := b.load(ctx, s, k, codes[i]); err != nil {
			return nil, errors.Join(fmt.Errorf("gpu: kernel %v: %w", k, err), s.Close())
		}
	}
	if err := s.check(ctx, keys); err != nil {
		return nil, errors.Join(err, s.Close())
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
		if !Supported(k.To, k.From) {
			return nil, fmt.Errorf("gpu: there is no kernel %v: %w", k, amdhip.ErrUnsupported)
		}
		if !slices.Contains(all, k) {
			all = append(all, k)
		}
	}
	return all, nil
}

// build is one call of Load.
type build struct {
	Compiler
	dev             *amdhip.Device
	options         []string
	hiprtc          string // where it is
	version, driver int
	compiled        atomic.Int64
	warned          atomic.Bool // that nothing can be kept
}

// begin finds out for what, and with what, c is to compile.
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
	if rt.Software() != nil {
		if b.Run = nil; b.Dir == "" {
			b.Dir = NoCache
		}
	}
	b.openCache()
	return b, nil
}

// options are the compiler's for kernels on devices of the architecture.
func options(arch string) []string { return []string{"--gpu-architecture=" + arch, "-std=c++17"} }

// code is a kernel's.
type code struct {
	object []byte
	cached bool
}

// codes returns the code of keys. What is missing is compiled, several at a time.
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

// code returns the code of k: from the cache, else compiled.
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

func (b *build) request(k Key) Request {
	return Request{Library: b.dev.Runtime().Library(), Name: k.Name(), Source: k.Source(), Options: b.options}
}

// inProcess is held while a compilation runs in this process. hipRTC lets only one run at a time anyway, and older versions of
// the compiler below it are not safe without that.
var inProcess sync.Mutex

// compile compiles k and keeps the code.
func (b *build) compile(ctx context.Context, k Key, r Request) (object []byte, err error) {
	run := b.Run
	if run == nil {
		run = func(ctx context.Context, r Request) ([]byte, error) {
			inProcess.Lock()
			defer inProcess.Unlock()
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			return b.dev.Runtime().Compile(r.Name, r.Source, r.Options...)
		}
	}
	start := time.Now()
	if object, err = run(ctx, r); err != nil {
		return nil, fmt.Errorf("gpu: compiling %v for %s: %w", k, b.dev.Arch(), err)
	}
	b.compiled.Add(1)
	b.Logger.Debug("compiled a kernel", "kernel", k, "arch", b.dev.Arch(), "bytes", len(object), "took", time.Since(start))
	b.write(b.entry(r), object)
	return object, nil
}

// load puts k's code on the device. Code from the cache that the device refuses is compiled again.
func (b *build) load(ctx context.Context, s *Set, k Key, c code) error {
	m, err := b.dev.LoadModule(c.object)
	if err != nil && c.cached {
		b.Logger.Debug("the device refuses a kernel from the cache", "kernel", k, "error", err)
		object, again := b.compile(ctx, k, b.request(k))
		if again != nil {
			return errors.Join(err, again)
		}
		m, err = b.dev.LoadModule(object)
	}
	if err != nil {
		return err
	}
	f, err := m.Function(k.Name())
	if err != nil {
		return errors.Join(err, m.Close())
	}
	s.kernels[k] = kernel{m, f}
	return nil
}
