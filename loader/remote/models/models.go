// Package models opens a model by any name that users have for one: the path of a file, an https address, a model of
// Hugging Face's hub (hf:), of ollama (ollama:), an artifact of a registry (oci://), an object in a bucket (s3://,
// gs://), a descriptor (fd:) or standard input (-).
//
//	o := models.New(models.Options{})
//	defer o.Close()
//	file, err := o.Open(ctx, "hf:ORG/REPO:Q4_K_M")
//	defer file.Close()
//
// Programs that need one kind of name only import the package for it, and not what the others need.
package models

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/hf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/oci"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/ollama"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/s3"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/stream"
)

// Names of models, for help texts.
const Names = "a file, https://HOST/PATH, hf:ORG/REPO[@REV][:QUANT|/FILE], ollama:NAME[:TAG], oci://REGISTRY/REPO:TAG, s3://BUCKET/KEY, gs://BUCKET/KEY, - (standard input) or fd:N"

// Options say where models are and how they are read. The zero value reads the environment, as the tools do that the
// names are from, when a name first needs it.
type Options struct {
	Remote remote.Options  // Tokens are for https addresses alone
	HF     *hf.Options     // nil: hf.FromEnvironment
	Ollama *ollama.Options // nil: ollama.FromEnvironment
	OCI    *oci.Options    // nil: oci.FromEnvironment
	S3     *s3.Options     // nil: s3.FromEnvironment
	Google *s3.Options     // nil: s3.GoogleFromEnvironment
	Stdin  io.Reader       // for "-"; nil: there is none. An *os.File that is a regular file is read as one
}

// Opener opens models. It is safe for concurrent use. The caller must Close it after the files.
type Opener struct {
	o      Options
	client *remote.Client
	hub    func() (*hf.Hub, error)
	store  func() *ollama.Store
	oci    func() (*oci.Registry, error)
	amazon func() (*s3.Store, error)
	google func() (*s3.Store, error)
	stdin  sync.Once

	mu   sync.Mutex
	open []*os.File // descriptors of files that may be opened again
}

// New returns an Opener.
func New(o Options) *Opener {
	c := remote.NewClient(o.Remote)
	return &Opener{
		o: o, client: c,
		hub: sync.OnceValues(func() (*hf.Hub, error) {
			if o.HF == nil {
				return hf.New(c, hf.FromEnvironment())
			}
			return hf.New(c, *o.HF)
		}),
		store: sync.OnceValue(func() *ollama.Store {
			if o.Ollama == nil {
				return ollama.New(c, ollama.FromEnvironment())
			}
			return ollama.New(c, *o.Ollama)
		}),
		oci: sync.OnceValues(func() (*oci.Registry, error) {
			if o.OCI != nil {
				return oci.New(c, *o.OCI), nil
			}
			found, err := oci.FromEnvironment()
			if err != nil {
				return nil, err
			}
			return oci.New(c, found), nil
		}),
		amazon: sync.OnceValues(func() (*s3.Store, error) {
			if o.S3 != nil {
				return s3.New(c, *o.S3)
			}
			found, err := s3.FromEnvironment(context.Background()) // it reads files alone
			if err != nil {
				return nil, err
			}
			return s3.New(c, found)
		}),
		google: sync.OnceValues(func() (*s3.Store, error) {
			if o.Google != nil {
				return s3.New(c, *o.Google)
			}
			return s3.New(c, s3.GoogleFromEnvironment())
		}),
	}
}

// Stats says what was sent and received so far.
func (o *Opener) Stats() remote.Stats { return o.client.Stats() }

// Close closes the connections that are not in use, and descriptors that were named.
func (o *Opener) Close() {
	o.client.Close()
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, f := range o.open {
		_ = f.Close() // it was read only
	}
	o.open = nil
}

// IsPath reports whether name is the path of a file, and nothing else.
func IsPath(name string) bool {
	_, isFD := strings.CutPrefix(name, "fd:")
	return !(name == "-" || isFD || hf.IsName(name) || ollama.IsName(name) || remote.IsAddress(name))
}

// IsStream reports whether name is of something that this process alone has: standard input or a descriptor.
func IsStream(name string) bool { return name == "-" || strings.HasPrefix(name, "fd:") }

// Opens reports whether name is one that Open does not take for the path of a file. With Open it is what a Holder of
// package loader/hold needs.
func (o *Opener) Opens(name string) bool { return !IsPath(name) }

// Open opens the model of that name. ctx is for opening alone. The caller must Close the file. Errors are those of
// [gguf.Open] for files, and of [remote.Client.Open] for others; names that cannot be match [remote.ErrAddress].
//
// Remote.Expect calls what comes by a descriptor by the name that is given here.
func (o *Opener) Open(ctx context.Context, name string) (*gguf.File, error) {
	switch n, isFD := strings.CutPrefix(name, "fd:"); {
	case name == "-":
		return o.openStdin(ctx)
	case isFD:
		return o.openDescriptor(ctx, n)
	case hf.IsName(name):
		n, err := hf.Parse(name)
		if err != nil {
			return nil, err
		}
		hub, err := o.hub()
		if err != nil {
			return nil, err
		}
		return hub.Open(ctx, n)
	case ollama.IsName(name):
		n, err := ollama.Parse(name)
		if err != nil {
			return nil, err
		}
		return o.store().Open(ctx, n)
	case oci.IsName(name):
		n, err := oci.Parse(name)
		if err != nil {
			return nil, err
		}
		registry, err := o.oci()
		if err != nil {
			return nil, err
		}
		return registry.Open(ctx, n)
	case s3.IsName(name):
		n, err := s3.Parse(name)
		if err != nil {
			return nil, err
		}
		store, err := o.bucketStore(n)
		if err != nil {
			return nil, err
		}
		return store.Open(ctx, n)
	case remote.IsAddress(name):
		return o.client.Open(ctx, name)
	}
	if o.o.Remote.Expect != nil {
		return o.client.OpenLocal(ctx, name, func(string) string { return "" })
	}
	return gguf.Open(name)
}

// bucketStore returns the store that n is of.
func (o *Opener) bucketStore(n s3.Name) (*s3.Store, error) {
	if n.Google {
		return o.google()
	}
	return o.amazon()
}

// openStdin opens what comes on standard input.
func (o *Opener) openStdin(ctx context.Context) (*gguf.File, error) {
	f, isFile := o.o.Stdin.(*os.File)
	if isFile && startsRegular(f) {
		return o.openFile(ctx, f, "-")
	}
	var r io.Reader
	o.stdin.Do(func() { r = o.o.Stdin })
	switch {
	case r == nil:
		return nil, fmt.Errorf("%w -: standard input can be read once, and by one who has it", remote.ErrAddress)
	case isFile:
		return o.openFile(ctx, f, "-")
	}
	return o.openStream(ctx, r, "-")
}

// openDescriptor opens what a descriptor of the process is of.
func (o *Opener) openDescriptor(ctx context.Context, number string) (*gguf.File, error) {
	n, err := strconv.ParseUint(number, 10, 31)
	if err != nil {
		return nil, fmt.Errorf("%w %.100q: use fd: and the number of a descriptor", remote.ErrAddress, "fd:"+number)
	}
	f := os.NewFile(uintptr(n), "fd:"+number)
	if f == nil {
		return nil, fmt.Errorf("%w fd:%s: there is no such descriptor", remote.ErrAddress, number)
	}
	return o.openFile(ctx, f, "fd:"+number)
}

// openFile opens the model in an open file: by its descriptor where it is a regular file that is at its beginning, else
// as a stream.
func (o *Opener) openFile(ctx context.Context, f *os.File, name string) (*gguf.File, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%w %s: there is no such descriptor: %w", remote.ErrAddress, name, err)
	}
	switch {
	case info.IsDir():
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("is a directory")}
	case startsRegular(f):
		return o.openRegular(ctx, f, name)
	}
	return o.openStream(ctx, f, name)
}

// startsRegular reports whether f is a regular file at its beginning, which can be opened any number of times.
func startsRegular(f *os.File) bool {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return false
	}
	at, err := f.Seek(0, io.SeekCurrent)
	return err == nil && at == 0
}

// openStream opens what comes once. It is compared with what is expected of it while it comes.
func (o *Opener) openStream(ctx context.Context, r io.Reader, name string) (*gguf.File, error) {
	if o.o.Remote.Expect == nil {
		return stream.Open(ctx, r, name)
	}
	expected, err := o.o.Remote.Expect(name)
	if err != nil {
		return nil, err
	}
	c, err := expected.Compare(name)
	if err != nil {
		return nil, err
	}
	return stream.OpenChecked(ctx, r, name, c)
}

// List says what a name offers that is not one model: a repository of the hub without a file or a quantization, and
// "ollama:", the models of ollama on this machine, a repository of a registry without a tag, and a bucket or a
// directory in it. It returns nil for other names.
func (o *Opener) List(ctx context.Context, name string) (*remote.Listing, error) {
	switch {
	case hf.IsName(name):
		n, err := hf.Parse(name)
		if err != nil {
			return nil, err
		}
		if n.File != "" || n.Quant != "" {
			return nil, nil
		}
		hub, err := o.hub()
		if err != nil {
			return nil, err
		}
		return hub.List(ctx, n)
	case name == "ollama:":
		return o.store().List()
	case oci.IsName(name):
		n, err := oci.Parse(name)
		if err != nil || n.Reference != "" || n.File != "" {
			return nil, err
		}
		registry, err := o.oci()
		if err != nil {
			return nil, err
		}
		return registry.List(ctx, n)
	case s3.IsName(name):
		n, err := s3.Parse(name)
		if err != nil || !n.IsDirectory() {
			return nil, err
		}
		store, err := o.bucketStore(n)
		if err != nil {
			return nil, err
		}
		return store.List(ctx, n)
	}
	return nil, nil
}
