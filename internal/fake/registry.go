package fake

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// Registry is a registry as ollama's is: manifests for everybody, and blobs in a Store that it redirects to. It has
// lists of tags, too, of two to a page, which that of ollama has not.
type Registry struct {
	*Server
	Store *Store

	mu        sync.Mutex
	manifests map[string]string // by NAMESPACE/MODEL/TAG
}

// NewRegistry starts a registry. The caller must Close it.
func NewRegistry() *Registry {
	r := &Registry{Store: NewStore(), manifests: map[string]string{}}
	r.Server = NewServer(r)
	return r
}

// Close ends both servers.
func (r *Registry) Close() {
	r.Server.Close()
	r.Store.Close()
}

// Manifest is the manifest of an ollama model that is the file b.
func Manifest(b []byte) string {
	return fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json",`+
		`"config":{"mediaType":"application/vnd.docker.container.image.v1+json","digest":%q,"size":4},"layers":[`+
		`{"mediaType":"application/vnd.ollama.image.model","digest":%q,"size":%d},`+
		`{"mediaType":"application/vnd.ollama.image.template","digest":%q,"size":4},`+
		`{"mediaType":"application/vnd.ollama.image.license","digest":%[1]q,"size":4}]}`,
		Digest([]byte("conf")), Digest(b), len(b), Digest([]byte("temp")))
}

// Add puts a model into the registry.
func (r *Registry) Add(name string, b []byte) {
	r.Store.Add(b)
	r.SetManifest(name, Manifest(b))
}

// SetManifest makes text the manifest of a name.
func (r *Registry) SetManifest(name, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.manifests[name] = text
}

// ServeHTTP answers as the registry does.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	p := strings.TrimPrefix(req.URL.Path, "/v2/")
	if repo, tag, ok := strings.Cut(p, "/manifests/"); ok {
		r.mu.Lock()
		text, ok := r.manifests[repo+"/"+tag]
		r.mu.Unlock()
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}`)
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8") // as the real one does
		w.Header().Set("Ollama-Content-Digest", strings.TrimPrefix(Digest([]byte(text)), "sha256:"))
		fmt.Fprint(w, text)
		return
	}
	if repo, ok := strings.CutSuffix(p, "/tags/list"); ok {
		r.list(w, req, repo)
		return
	}
	_, digest, ok := strings.Cut(p, "/blobs/")
	if !ok || !r.Store.Has(digest) {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Docker-Content-Digest", digest)
	http.Redirect(w, req, r.Store.Address(digest), http.StatusTemporaryRedirect)
}

// list answers with a page of the tags of a repository.
func (r *Registry) list(w http.ResponseWriter, req *http.Request, repo string) {
	const perPage = 2
	r.mu.Lock()
	defer r.mu.Unlock()
	tags := []string{}
	for name := range r.manifests {
		if tag, ok := strings.CutPrefix(name, repo+"/"); ok && !strings.Contains(tag, ":") && tag > req.URL.Query().Get("last") {
			tags = append(tags, tag)
		}
	}
	slices.Sort(tags)
	if len(tags) > perPage {
		tags = tags[:perPage]
		w.Header().Set("Link", fmt.Sprintf(`</v2/%s/tags/list?last=%s&n=%d>; rel="next"`, repo, tags[perPage-1], perPage))
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"name": repo, "tags": tags}) // nobody to tell
}
