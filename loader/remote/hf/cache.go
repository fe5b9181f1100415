package hf

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// The hub's local cache has a directory for each repository, with blobs, named by their hashes; refs, files that hold
// the commit of a branch or tag; and snapshots, a directory for each commit with links to blobs. A blob that is still
// being fetched has another name, so that what a snapshot links to is complete.

// dir is the directory of a repository in the cache.
func (h *Hub) dir(repository string) string {
	return filepath.Join(h.o.Cache, "models--"+strings.ReplaceAll(repository, "/", "--"))
}

// local returns what the cache has of the revision of n. ok is false if it does not know the revision.
func (h *Hub) local(n Name) (r *repo, ok bool) {
	if h.o.Cache == "" {
		return nil, false
	}
	commit := n.revision()
	if !isCommit(commit) {
		text, err := os.ReadFile(filepath.Join(h.dir(n.Repo), "refs", filepath.FromSlash(commit)))
		if err != nil || len(text) > 1<<10 {
			return nil, false
		}
		commit = strings.TrimSpace(string(text))
	}
	r = h.at(n.Repo, commit)
	return r, r != nil
}

// at returns what the cache has of a commit; nil: nothing.
func (h *Hub) at(repository, commit string) *repo {
	if h.o.Cache == "" || !isCommit(commit) {
		return nil
	}
	root := filepath.Join(h.dir(repository), "snapshots", commit)
	r := &repo{commit: commit}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := os.Stat(p) // of what a link leads to
		if err != nil || !info.Mode().IsRegular() {
			return nil
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		f := file{path: filepath.ToSlash(rel), size: info.Size()}
		if to, err := os.Readlink(p); err == nil && len(filepath.Base(to)) == 64 {
			f.digest = "sha256:" + filepath.Base(to)
		}
		r.files = append(r.files, f)
		return nil
	})
	if err != nil || len(r.files) == 0 {
		return nil
	}
	return r
}

// complete reports whether r, what the cache has, has all parts of the model at a path as the hub lists them.
func (r *repo) complete(hub *repo, p string) bool {
	if r == nil {
		return false
	}
	for _, p := range parts(p) {
		have, want := r.file(p), hub.file(p)
		if have == nil || want == nil || want.size > 0 && have.size != want.size ||
			have.digest != "" && want.digest != "" && have.digest != want.digest {
			return false
		}
	}
	return true
}

// openLocal opens what n names from r, which is in the cache. The error matches fs.ErrNotExist if it is not there, or
// not all of it.
func (h *Hub) openLocal(ctx context.Context, n Name, r *repo) (*gguf.File, error) {
	p, err := r.choose(n)
	if err != nil {
		return nil, err
	}
	for _, part := range parts(p) {
		if r.file(part) == nil {
			return nil, fmt.Errorf("%s: the cache %s has no %q: %w", n, h.o.Cache, part, fs.ErrNotExist)
		}
	}
	dir := path.Dir(p)
	root := filepath.Join(h.dir(n.Repo), "snapshots", r.commit)
	f, err := h.client.OpenLocal(ctx, filepath.Join(root, filepath.FromSlash(p)), func(name string) string {
		if f := r.file(path.Join(dir, name)); f != nil {
			return f.digest
		}
		return ""
	})
	if errors.Is(err, gguf.ErrSplit) {
		return nil, errors.Join(err, fs.ErrNotExist)
	}
	return f, err
}
