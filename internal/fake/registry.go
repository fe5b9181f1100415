package fake

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
)

// Registry is a registry as ollama's is: manifests for everybody, and blobs in a Store that it redirects to.
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
	_, digest, ok := strings.Cut(p, "/blobs/")
	if !ok || !r.Store.Has(digest) {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Docker-Content-Digest", digest)
	http.Redirect(w, req, r.Store.Address(digest), http.StatusTemporaryRedirect)
}
