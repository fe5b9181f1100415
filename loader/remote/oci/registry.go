package oci

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"slices"
	"strings"
	"sync"

	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/internal/manifest"
)

// Registry opens models of registries. It is safe for concurrent use.
type Registry struct {
	client *remote.Client
	o      Options

	mu    sync.Mutex
	hosts map[string]*host
}

// host is what is known of a registry.
type host struct {
	auth   *auth.Client
	asker  *asker
	once   sync.Mutex // held while the scheme is found out
	scheme string     // "": not known yet
}

// New returns a Registry that reads by means of c, which must not be closed before what was opened.
func New(c *remote.Client, o Options) *Registry {
	return &Registry{client: c, o: o, hosts: map[string]*host{}}
}

// host returns what is known of a registry.
func (r *Registry) host(name string) *host {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.hosts[name]
	if h == nil {
		by := &asker{o: r.o}
		h = &host{auth: newAuth(r.client, by, name), asker: by}
		r.hosts[name] = h
	}
	return h
}

// sender returns what sends requests about a repository.
func (r *Registry) sender(n Name) func(*http.Request) (*http.Response, error) {
	h := r.host(n.host())
	return func(req *http.Request) (*http.Response, error) {
		ctx := auth.WithScopesForHost(req.Context(), n.host(), auth.ScopeRepository(n.Repository, auth.ActionPull))
		return h.send(req.WithContext(ctx))
	}
}

// base is the address of a repository. A registry of this host may have no TLS, and others where the client allows it.
func (r *Registry) base(ctx context.Context, n Name) (string, error) {
	h := r.host(n.host())
	h.once.Lock()
	defer h.once.Unlock()
	if h.scheme == "" {
		_, _, err := r.client.Get(ctx, remote.Document{URL: "https://" + n.host() + "/v2/"})
		_, answered := errors.AsType[*remote.StatusError](err)
		switch {
		case err == nil, answered:
			h.scheme = "https"
		case isPlain(err):
			h.scheme = "http" // the client refuses it, or sends no credentials, where it is not safe
		default:
			return "", fmt.Errorf("%s: %w", n, err)
		}
	}
	return h.scheme + "://" + n.host() + "/v2/" + n.Repository, nil
}

// isPlain reports whether a server answered without TLS.
func isPlain(err error) bool {
	record, ok := errors.AsType[tls.RecordHeaderError](err)
	return ok && string(record.RecordHeader[:]) == "HTTP/"
}

// maxIndex is how many manifests of an index are looked at for a model.
const maxIndex = 8

// artifact is what a name stands for.
type artifact struct {
	base   string // the address of the repository
	digest string // of the manifest
	files  []manifest.File
}

// resolve finds out what a name stands for.
func (r *Registry) resolve(ctx context.Context, n Name) (*artifact, error) {
	base, err := r.base(ctx, n)
	if err != nil {
		return nil, err
	}
	a := &artifact{base: base}
	m, digest, err := r.manifest(ctx, n, base, n.reference())
	if err != nil {
		return nil, err
	}
	if a.digest = digest; !m.IsIndex() {
		if a.files, err = m.Files(); err != nil {
			return nil, fmt.Errorf("%s: %w", n, err)
		}
		return a, nil
	}
	none := fmt.Errorf("%w, but an empty index", manifest.ErrNoModel)
	for _, d := range m.Manifests[:min(len(m.Manifests), maxIndex)] {
		if m, _, err = r.manifest(ctx, n, base, d.Digest); err != nil {
			return nil, err
		}
		if a.files, none = m.Files(); none == nil {
			return a, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", n, none)
}

// manifest fetches a manifest, and returns its digest.
func (r *Registry) manifest(ctx context.Context, n Name, base, reference string) (*manifest.Manifest, string, error) {
	address := base + "/manifests/" + reference
	text, header, err := r.client.Get(ctx, remote.Document{URL: address, Accept: manifest.Accept, Send: r.sender(n)})
	if err != nil {
		return nil, "", r.explain(n, err)
	}
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(text))
	if strings.HasPrefix(reference, "sha512:") {
		digest = fmt.Sprintf("sha512:%x", sha512.Sum512(text))
	}
	if strings.Contains(reference, ":") && digest != reference {
		return nil, "", fmt.Errorf("%s: %w: the manifest has %s", n, remote.ErrDigest, digest)
	}
	if said := header.Get("Docker-Content-Digest"); strings.HasPrefix(said, "sha256:") && strings.HasPrefix(digest, "sha256:") && said != digest {
		return nil, "", fmt.Errorf("%s: %w: the manifest has %s, and should have %.100s", n, remote.ErrDigest, digest, said)
	}
	m, err := manifest.Parse(text)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w: %w", address, remote.ErrReply, err)
	}
	return m, digest, nil
}

// explain adds the name, and what a refusal may mean.
func (r *Registry) explain(n Name, err error) error {
	if !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%s: %w", n, err)
	}
	if _, why := r.host(n.host()).asker.last(); why != nil {
		return fmt.Errorf("%s: it was asked for without credentials, and is private or does not exist: %w; %w", n, why, err)
	}
	return fmt.Errorf("%s: there is no such artifact, or it is private ('docker login %s' gives the credentials): %w",
		n, n.Registry, err)
}

// Open opens the model that n names, with all its parts if it is split. The error matches [fs.ErrNotExist] if there is
// no such model, and [remote.ErrDigest] if a manifest is not what its digest says; that of files shows in
// [gguf.File.Check]. The caller must Close the file.
func (r *Registry) Open(ctx context.Context, n Name) (*gguf.File, error) {
	a, err := r.resolve(ctx, n)
	if err != nil {
		return nil, err
	}
	files, first, err := a.choose(n)
	if err != nil {
		return nil, err
	}
	f, err := r.client.OpenObjects(ctx, first, func(_ context.Context, name string) (remote.Object, error) {
		x, ok := files[name]
		if !ok {
			return remote.Object{}, fmt.Errorf("%s: the artifact has no file %q: %w", n, name, fs.ErrNotExist)
		}
		return remote.Object{
			URL: a.base + "/blobs/" + x.Digest, Size: x.Size, Digest: x.Digest, Check: true, Revision: a.digest, Send: r.sender(n),
		}, nil
	})
	if err != nil && errors.Is(err, fs.ErrPermission) {
		return nil, r.explain(n, err)
	}
	return f, err
}

// choose returns the files of the model that n names, by the names that the parts of a split must have, and the first
// one.
func (a *artifact) choose(n Name) (files map[string]manifest.File, first string, err error) {
	files = map[string]manifest.File{}
	if i := slices.IndexFunc(a.files, func(f manifest.File) bool { return f.Path == n.File }); n.File != "" {
		if i < 0 {
			return nil, "", fmt.Errorf("%s: the artifact has no such file; it has %s: %w", n, a.names(), fs.ErrNotExist)
		}
		first = a.files[i].Name()
	}
	if len(a.files) == 1 { // whatever it is called
		return map[string]manifest.File{"model.gguf": a.files[0]}, "model.gguf", nil
	}
	split := true
	for i, f := range a.files {
		name := f.Name()
		if name == "" { // Docker's have no names, but an order
			name = fmt.Sprintf("model-%05d-of-%05d.gguf", i+1, len(a.files))
		}
		if !isPart(name, len(a.files)) {
			split = false
		}
		files[name] = f
		if first == "" {
			first = name
		}
	}
	if n.File == "" && !split {
		return nil, "", fmt.Errorf("%s: the artifact has several models: %s; name one behind a #: %w", n, a.names(), fs.ErrNotExist)
	}
	return files, first, nil
}

// isPart reports whether a name is that of a part of a split with so many parts.
func isPart(name string, count int) bool {
	return strings.HasSuffix(name, fmt.Sprintf("-of-%05d.gguf", count))
}

// names lists the files, for an error.
func (a *artifact) names() string {
	const most = 20
	var all []string
	for _, f := range a.files[:min(len(a.files), most)] {
		all = append(all, fmt.Sprintf("%.200q", f.Path))
	}
	return strings.Join(all, ", ")
}

// List says which models an artifact has, or, for a name without a tag, which tags a repository has.
func (r *Registry) List(ctx context.Context, n Name) (*remote.Listing, error) {
	l := &remote.Listing{Name: n.String()}
	if n.Reference == "" {
		tags, err := r.tags(ctx, n)
		if err != nil {
			return nil, err
		}
		for _, tag := range tags {
			named := n
			named.Reference = tag
			l.Entries = append(l.Entries, remote.Entry{Name: named.String(), Quant: remote.Quant(tag), Default: tag == "latest"})
		}
		return l, nil
	}
	a, err := r.resolve(ctx, n)
	if err != nil {
		return nil, err
	}
	l.Revision = a.digest
	for _, f := range a.files {
		named := n
		if named.File = f.Path; len(a.files) == 1 {
			named.File = ""
		}
		l.Entries = append(l.Entries, remote.Entry{
			Name: named.String(), File: f.Path, Quant: remote.Quant(f.Path), Files: 1, Bytes: f.Size, Default: len(a.files) == 1,
		})
	}
	return l, nil
}
