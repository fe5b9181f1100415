package hf

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

const (
	// DefaultEndpoint is the hub that is used unless Options name another one.
	DefaultEndpoint = "https://huggingface.co"
	// maxList is the greatest list of files, in bytes: repositories have up to 10^5 files.
	maxList = 64 << 20
)

// Options say which hub it is. The zero value is huggingface.co, without a token and without a cache.
type Options struct {
	Endpoint string // its address; "": DefaultEndpoint
	Token    string // for the host of Endpoint, and for no other; "": none
	Cache    string // the directory of the hub's local cache, such as ~/.cache/huggingface/hub; "": not used
	Offline  bool   // use the cache alone
}

// FromEnvironment returns Options as Hugging Face's own tools find them: HF_ENDPOINT, HF_TOKEN or the file that
// HF_TOKEN_PATH names or that is in HF_HOME, HF_HUB_CACHE or HF_HOME, HF_HUB_OFFLINE.
func FromEnvironment() Options {
	home := os.Getenv("HF_HOME")
	if home == "" {
		if dir := os.Getenv("XDG_CACHE_HOME"); dir != "" {
			home = filepath.Join(dir, "huggingface")
		} else if dir, err := os.UserHomeDir(); err == nil {
			home = filepath.Join(dir, ".cache", "huggingface")
		}
	}
	o := Options{
		Endpoint: strings.TrimSpace(os.Getenv("HF_ENDPOINT")), Token: strings.TrimSpace(os.Getenv("HF_TOKEN")),
		Cache: os.Getenv("HF_HUB_CACHE"), Offline: isSet("HF_HUB_OFFLINE"),
	}
	if home == "" {
		return o
	}
	if o.Cache == "" {
		o.Cache = filepath.Join(home, "hub")
	}
	if o.Token == "" && !isSet("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
		text, err := os.ReadFile(cmp.Or(os.Getenv("HF_TOKEN_PATH"), filepath.Join(home, "token")))
		if err == nil && len(text) < 1<<10 {
			o.Token = strings.TrimSpace(string(text))
		}
	}
	return o
}

func isSet(name string) bool {
	switch strings.ToUpper(os.Getenv(name)) {
	case "1", "ON", "YES", "TRUE":
		return true
	}
	return false
}

// Hub opens models of a hub. It is safe for concurrent use.
type Hub struct {
	client   *remote.Client
	o        Options
	endpoint *url.URL
}

// New returns a Hub that reads by means of c, which must not be closed before what was opened. The error matches
// [remote.ErrAddress] if the endpoint cannot be one.
func New(c *remote.Client, o Options) (*Hub, error) {
	u, err := url.Parse(strings.TrimRight(cmp.Or(o.Endpoint, DefaultEndpoint), "/"))
	switch {
	case err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Scheme != "https" && u.Scheme != "http":
		return nil, fmt.Errorf("%w %s: the endpoint of a hub is https://HOST", remote.ErrAddress, remote.Redact(o.Endpoint))
	case strings.ContainsFunc(o.Token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return nil, fmt.Errorf("%w %s: the token for it holds characters that no token has", remote.ErrAddress, u)
	}
	return &Hub{client: c, o: o, endpoint: u}, nil
}

// send adds the token to a request to the endpoint. Package remote calls it for no other host.
func (h *Hub) send(req *http.Request) (*http.Response, error) {
	req.Header.Set("Authorization", "Bearer "+h.o.Token)
	return h.client.RoundTrip(req)
}

// sender is send, or nil without a token.
func (h *Hub) sender() func(*http.Request) (*http.Response, error) {
	if h.o.Token == "" {
		return nil
	}
	return h.send
}

// address is that of a path below the endpoint. Elements are escaped.
func (h *Hub) address(elements ...string) string {
	p := strings.TrimRight(h.endpoint.EscapedPath(), "/")
	for _, e := range elements {
		p += "/" + url.PathEscape(e)
	}
	return h.endpoint.Scheme + "://" + h.endpoint.Host + p
}

// repo is a repository at a commit.
type repo struct {
	commit string
	files  []file
}

// file is a file of a repository.
type file struct {
	path   string
	size   int64  // 0: not known
	digest string // "sha256:…", or ""
}

// info is the hub's reply about a revision, as far as it is used.
type info struct {
	SHA      string `json:"sha"`
	Siblings []struct {
		Path string `json:"rfilename"`
		Size int64  `json:"size"`
		LFS  *struct {
			SHA256 string `json:"sha256"`
			Size   int64  `json:"size"`
		} `json:"lfs"`
	} `json:"siblings"`
}

// ask asks the hub what a repository has.
func (h *Hub) ask(ctx context.Context, n Name) (*repo, error) {
	org, name, _ := strings.Cut(n.Repo, "/")
	address := h.address("api", "models", org, name, "revision", n.revision())
	text, _, err := h.client.Get(ctx, remote.Document{
		URL: address + "?blobs=true", Accept: "application/json", Limit: maxList, Send: h.sender(),
	})
	if err != nil {
		return nil, h.explain(n, err)
	}
	var i info
	if err := json.Unmarshal(text, &i); err != nil {
		return nil, fmt.Errorf("%s: %w: the list of files cannot be read: %w", address, remote.ErrReply, err)
	}
	if !isCommit(i.SHA) {
		return nil, fmt.Errorf("%s: %w: it names %.100q as the commit", address, remote.ErrReply, i.SHA)
	}
	r := &repo{commit: i.SHA}
	for _, s := range i.Siblings {
		f := file{path: s.Path, size: s.Size}
		if s.LFS != nil {
			f.size = s.LFS.Size
			if len(s.LFS.SHA256) == 64 {
				f.digest = "sha256:" + strings.ToLower(s.LFS.SHA256)
			}
		}
		if !isFile(f.path) || f.size < 0 {
			return nil, fmt.Errorf("%s: %w: it lists the file %.300q of %d bytes", address, remote.ErrReply, f.path, f.size)
		}
		r.files = append(r.files, f)
	}
	return r, nil
}

// explain adds what a refusal may mean. The hub answers for private repositories as for those that do not exist.
func (h *Hub) explain(n Name, err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission) && h.o.Token == "":
		return fmt.Errorf("%s: there is no such repository, or it is private or gated and needs a token (HF_TOKEN): %w", n, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: the token does not give access; a gated repository wants its terms accepted on its page: %w", n, err)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: there is no such repository or revision: %w", n, err)
	}
	return fmt.Errorf("%s: %w", n, err)
}

// isCommit reports whether s is the hash of a commit.
func isCommit(s string) bool {
	return len(s) == 40 && strings.Trim(s, "0123456789abcdef") == ""
}

// Open opens the model that n names. Errors are those of [remote.Client.Open]; one that matches [fs.ErrNotExist] says
// what the repository has. The caller must Close the file.
func (h *Hub) Open(ctx context.Context, n Name) (*gguf.File, error) {
	have, known := h.local(n)
	if known && (n.File != "" || h.o.Offline || have.hasExactly(cmp.Or(n.Quant, defaultQuant))) {
		if f, err := h.openLocal(ctx, n, have); !errors.Is(err, fs.ErrNotExist) || h.o.Offline {
			return f, err
		}
	}
	if h.o.Offline {
		return nil, fmt.Errorf("%s: not in the cache %s, and the hub is not to be asked (HF_HUB_OFFLINE): %w",
			n, h.o.Cache, fs.ErrNotExist)
	}
	r, err := h.ask(ctx, n)
	if err != nil {
		if known && isUnreachable(err) {
			if f, local := h.openLocal(ctx, n, have); local == nil {
				return f, nil
			}
		}
		return nil, err
	}
	chosen, err := r.choose(n)
	if err != nil {
		return nil, err
	}
	n.File = chosen
	if have := h.at(n.Repo, r.commit); have.complete(r, chosen) {
		return h.openLocal(ctx, n, have)
	}
	return h.openRemote(ctx, n, r)
}

// isUnreachable reports whether a server did not answer, other than by refusing.
func isUnreachable(err error) bool {
	_, answered := errors.AsType[*remote.StatusError](err)
	return !answered && !errors.Is(err, remote.ErrReply) && !errors.Is(err, context.Canceled)
}

// openRemote opens n.File of r on the hub.
func (h *Hub) openRemote(ctx context.Context, n Name, r *repo) (*gguf.File, error) {
	org, name, _ := strings.Cut(n.Repo, "/")
	dir := path.Dir(n.File)
	locate := func(_ context.Context, base string) (remote.Object, error) {
		p := path.Join(dir, base)
		f := r.file(p)
		if f == nil {
			return remote.Object{}, fmt.Errorf("%s: the repository has no file %q: %w", n, p, fs.ErrNotExist)
		}
		elements := append([]string{org, name, "resolve", r.commit}, strings.Split(p, "/")...)
		return remote.Object{
			URL: h.address(elements...), Size: f.size, Digest: f.digest, Revision: r.commit, Send: h.sender(),
		}, nil
	}
	file, err := h.client.OpenObjects(ctx, path.Base(n.File), locate)
	if err != nil && errors.Is(err, fs.ErrPermission) {
		return nil, h.explain(n, err)
	}
	return file, err
}

// List says what the repository has, without opening anything.
func (h *Hub) List(ctx context.Context, n Name) (*remote.Listing, error) {
	have, known := h.local(n)
	r := have
	if !h.o.Offline {
		asked, err := h.ask(ctx, n)
		switch {
		case err == nil:
			r, have, known = asked, h.at(n.Repo, asked.commit), true
		case !known || !isUnreachable(err):
			return nil, err
		}
	}
	if !known {
		return nil, fmt.Errorf("%s: not in the cache %s: %w", n, h.o.Cache, fs.ErrNotExist)
	}
	whole := Name{Repo: n.Repo, Revision: n.Revision}
	l := &remote.Listing{Name: whole.String(), Revision: r.commit}
	standard, _ := r.choose(whole)
	for _, m := range r.models() {
		e := remote.Entry{
			File: m.path, Quant: remote.Quant(m.path), Files: m.files, Bytes: m.size,
			Default: m.path == standard,
		}
		named := whole
		if named.Quant = e.Quant; e.Quant == "" || r.find(e.Quant) != m.path {
			named.Quant, named.File = "", m.path
		}
		e.Name, e.Local = named.String(), have.complete(r, m.path)
		l.Entries = append(l.Entries, e)
	}
	return l, nil
}
