package ollama

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/internal/manifest"
)

// Options say where models are. The zero value is for registries alone.
type Options struct {
	// Stores are directories of ollama's models, with manifests and blobs in them. The first that has a model is used.
	Stores []string
	// Endpoint is the address that stands for the host of every name, such as a mirror; "": https:// and that host.
	Endpoint string
	// Offline: use the stores alone.
	Offline bool
	// Key is the file of the private key that ollama has for the user, such as ~/.ollama/id_ed25519. Registries that want
	// to know who asks get a signature by it, and nobody else does. "": there is none.
	Key string
}

// FromEnvironment returns Options as ollama finds its models: OLLAMA_MODELS, or else the directory of the user and that
// of the service; and the user's key.
func FromEnvironment() Options {
	var o Options
	home, err := os.UserHomeDir()
	if err == nil {
		o.Key = filepath.Join(home, ".ollama", "id_ed25519")
	}
	if dir := os.Getenv("OLLAMA_MODELS"); dir != "" {
		o.Stores = []string{dir}
		return o
	}
	if err == nil {
		o.Stores = append(o.Stores, filepath.Join(home, ".ollama", "models"))
	}
	if runtime.GOOS == "linux" {
		o.Stores = append(o.Stores, "/usr/share/ollama/.ollama/models")
	}
	return o
}

// Store opens models. It is safe for concurrent use.
type Store struct {
	client *remote.Client
	o      Options
}

// New returns a Store that reads by means of c, which must not be closed before what was opened.
func New(c *remote.Client, o Options) *Store { return &Store{c, o} }

// maxManifest is the greatest manifest, in bytes, that is read from a store.
const maxManifest = 4 << 20

// Open opens the model that n names. The error matches [fs.ErrNotExist] if it is nowhere. The caller must Close the
// file.
func (s *Store) Open(ctx context.Context, n Name) (*gguf.File, error) {
	for _, dir := range s.o.Stores {
		f, err := s.openLocal(ctx, dir, n)
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
			return f, err
		}
	}
	if s.o.Offline {
		return nil, fmt.Errorf("%s: not in %s: %w", n, strings.Join(s.o.Stores, ", "), fs.ErrNotExist)
	}
	return s.openRemote(ctx, n)
}

// dirOf is the directory of the manifests of a host. Ports are written with a colon, which Windows does not have.
func dirOf(host string) string {
	if runtime.GOOS == "windows" {
		return strings.ReplaceAll(host, ":", "%")
	}
	return host
}

// openLocal opens a model of a store.
func (s *Store) openLocal(ctx context.Context, dir string, n Name) (*gguf.File, error) {
	path := filepath.Join(dir, "manifests", dirOf(n.Host), n.Namespace, n.Model, n.Tag)
	m, err := readManifest(path)
	if err != nil {
		return nil, err
	}
	files, err := m.Files()
	if err != nil {
		return nil, &gguf.FormatError{Path: path, Offset: -1, Err: err}
	}
	if len(files) > 1 {
		return nil, &gguf.FormatError{Path: path, Offset: -1, Err: fmt.Errorf("it has %d model files", len(files))}
	}
	blob := filepath.Join(dir, "blobs", strings.Replace(files[0].Digest, ":", "-", 1))
	info, err := os.Stat(blob)
	if err != nil {
		return nil, err // the manifest is there, the blob is not yet, or not any more
	}
	if info.Size() != files[0].Size {
		return nil, &gguf.FormatError{Path: blob, Offset: -1, Err: fmt.Errorf(
			"%w: it has %d bytes, and should have %d", gguf.ErrTruncated, info.Size(), files[0].Size)}
	}
	return s.client.OpenLocal(ctx, blob, func(string) string { return files[0].Digest })
}

// readManifest reads the manifest at a path.
func readManifest(path string) (*manifest.Manifest, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxManifest {
		return nil, &gguf.FormatError{Path: path, Offset: -1, Err: errors.New("not a manifest")}
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	m, err := manifest.Parse(text)
	if err != nil {
		return nil, &gguf.FormatError{Path: path, Offset: -1, Err: err}
	}
	return m, nil
}

// openRemote opens a model of a registry.
func (s *Store) openRemote(ctx context.Context, n Name) (*gguf.File, error) {
	base := strings.TrimRight(s.o.Endpoint, "/")
	if base == "" {
		base = (&url.URL{Scheme: "https", Host: n.Host}).String()
	}
	base += "/v2/" + n.Namespace + "/" + n.Model
	address := base + "/manifests/" + n.Tag
	var send func(*http.Request) (*http.Response, error)
	if _, err := os.Stat(s.o.Key); err == nil {
		send = (&sender{client: s.client, key: s.o.Key}).send
	}
	text, _, err := s.client.Get(ctx, remote.Document{URL: address, Accept: manifest.Docker + ", " + manifest.OCI, Send: send})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s: there is no such model: %w", n, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: the registry wants to know who asks, and takes no key of ollama's (%q); "+
			"oci://%s/%s/%s:%s takes the credentials of the docker configuration: %w",
			n, s.o.Key, n.Host, n.Namespace, n.Model, n.Tag, err)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", n, err)
	}
	m, err := manifest.Parse(text)
	var files []manifest.File
	if err == nil {
		files, err = m.Files()
	}
	if err == nil && len(files) > 1 {
		err = fmt.Errorf("it has %d model files", len(files))
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", address, remote.ErrReply, err)
	}
	o := remote.Object{
		URL: base + "/blobs/" + files[0].Digest, Size: files[0].Size, Digest: files[0].Digest, Check: true, Send: send,
	}
	return s.client.OpenObjects(ctx, n.Model+".gguf", func(context.Context, string) (remote.Object, error) { return o, nil })
}

// List says which models the stores have.
func (s *Store) List() (*remote.Listing, error) {
	l := &remote.Listing{Name: "ollama:"}
	seen := map[string]bool{}
	for _, dir := range s.o.Stores {
		root := filepath.Join(dir, "manifests")
		err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
					return nil
				}
				return err
			}
			rel, err := filepath.Rel(root, p)
			if err != nil {
				return err
			}
			parts := strings.Split(filepath.ToSlash(rel), "/")
			if len(parts) != 4 {
				return nil
			}
			n, err := Parse("ollama:" + strings.ReplaceAll(strings.Join(parts[:3], "/"), "%", ":") + ":" + parts[3])
			if err != nil || seen[n.String()] {
				return nil // of something else
			}
			m, err := readManifest(p)
			if err != nil {
				return nil // opening it will say what is wrong
			}
			if files, err := m.Files(); err == nil {
				seen[n.String()] = true
				l.Entries = append(l.Entries, remote.Entry{
					Name: n.String(), Quant: remote.Quant(n.Tag), Files: 1, Bytes: files[0].Size, Local: true,
				})
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return l, nil
}
