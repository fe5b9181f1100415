package fake

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path"
	"strings"
	"sync"
)

// Commit is the commit of every repository of a Hub.
const Commit = "0123456789abcdef0123456789abcdef01234567"

// Hub is a server with the interface of Hugging Face's hub. Large files are in a Store, which it redirects to, as the
// real one does.
type Hub struct {
	*Server
	Store *Store
	Token string // that private repositories want; "": all are public

	mu    sync.Mutex
	order []string          // of the paths
	files map[string][]byte // by REPO/PATH
	sums  map[string]string // their digests
}

// NewHub starts a hub. The caller must Close it.
func NewHub() *Hub {
	h := &Hub{Store: NewStore(), files: map[string][]byte{}, sums: map[string]string{}}
	h.Server = NewServer(h)
	return h
}

// Close ends both servers.
func (h *Hub) Close() {
	h.Server.Close()
	h.Store.Close()
}

// Add puts a file into a repository.
func (h *Hub) Add(repo, file string, b []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.order = append(h.order, path.Join(repo, file))
	h.files[path.Join(repo, file)], h.sums[path.Join(repo, file)] = b, h.Store.Add(b)
}

// ServeHTTP answers as the hub does.
func (h *Hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.Token != "" && r.Header.Get("Authorization") != "Bearer "+h.Token {
		w.Header().Set("X-Error-Code", "RepoNotFound")
		w.Header().Set("X-Error-Message", "Repository not found")
		w.WriteHeader(http.StatusUnauthorized)
		io.WriteString(w, `{"error":"Invalid username or password."}`)
		return
	}
	p := strings.TrimPrefix(r.URL.Path, "/")
	if rest, ok := strings.CutPrefix(p, "api/models/"); ok {
		repo, revision, _ := strings.Cut(rest, "/revision/")
		h.list(w, r, repo, revision)
		return
	}
	repo, rest, ok := strings.Cut(p, "/resolve/")
	commit, file, _ := strings.Cut(rest, "/")
	h.mu.Lock()
	b, found := h.files[path.Join(repo, file)]
	digest := h.sums[path.Join(repo, file)]
	h.mu.Unlock()
	if !ok || !found || commit != Commit {
		w.Header().Set("X-Error-Code", "EntryNotFound")
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("X-Repo-Commit", Commit)
	w.Header().Set("X-Linked-Size", fmt.Sprint(len(b)))
	w.Header().Set("X-Linked-ETag", `"`+strings.TrimPrefix(digest, "sha256:")+`"`)
	w.Header().Set("Accept-Ranges", "bytes")
	w.Header().Set("Location", h.Store.Address(digest))
	w.WriteHeader(http.StatusFound)
	fmt.Fprintf(w, "Found. Redirecting to %s", h.Store.Address(digest))
}

// list answers what a repository has.
func (h *Hub) list(w http.ResponseWriter, r *http.Request, repo, revision string) {
	type lfs struct {
		SHA256      string `json:"sha256"`
		Size        int    `json:"size"`
		PointerSize int    `json:"pointerSize"`
	}
	type sibling struct {
		Path   string `json:"rfilename"`
		BlobID string `json:"blobId,omitempty"`
		Size   *int   `json:"size,omitempty"`
		LFS    *lfs   `json:"lfs,omitempty"`
	}
	reply := struct {
		InternalID string    `json:"_id"`
		ID         string    `json:"id"`
		Private    bool      `json:"private"`
		Pipeline   string    `json:"pipeline_tag"`
		Tags       []string  `json:"tags"`
		Gated      any       `json:"gated"`
		SHA        string    `json:"sha"`
		Siblings   []sibling `json:"siblings"`
	}{"66a0", repo, h.Token != "", "text-generation", []string{"gguf"}, false, Commit, nil}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, p := range h.order {
		file, ok := strings.CutPrefix(p, repo+"/")
		if !ok {
			continue
		}
		b, s := h.files[p], sibling{Path: file}
		if r.URL.Query().Get("blobs") == "true" {
			n := len(b)
			s.BlobID, s.Size = "1f1b", &n
			if n > 1000 {
				s.LFS = &lfs{strings.TrimPrefix(h.sums[p], "sha256:"), n, 135}
			}
		}
		reply.Siblings = append(reply.Siblings, s)
	}
	if len(reply.Siblings) == 0 || revision != "main" && revision != "v1" && revision != "refs/pr/1" && revision != Commit {
		w.Header().Set("X-Error-Code", "RevisionNotFound")
		w.WriteHeader(http.StatusNotFound)
		io.WriteString(w, `{"error":"Invalid rev id"}`)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_ = json.NewEncoder(w).Encode(reply) // nobody to tell
}
