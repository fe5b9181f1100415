package models

import (
	"context"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/hf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/oci"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/ollama"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/s3"
)

// Complete returns the names that begin with prefix, as far as they can be listed: quantizations and files of a
// repository of the hub, models of ollama on this machine, tags of a repository of a registry and, behind a #, files of
// an artifact, and objects of a bucket.
func (o *Opener) Complete(ctx context.Context, prefix string) []string {
	// hf:// and ollama:// are hf: and ollama: in the names that are listed.
	scheme, rest, _ := strings.Cut(prefix, ":")
	short, long := scheme+":", scheme+"://"
	if scheme != "hf" && scheme != "ollama" || !strings.HasPrefix(rest, "//") {
		long = short
	}
	var names []string
	for _, name := range o.offered(ctx, strings.Replace(prefix, long, short, 1)) {
		if name = long + strings.TrimPrefix(name, short); strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	return names
}

// offered returns names of which those that begin with prefix are some.
func (o *Opener) offered(ctx context.Context, prefix string) []string {
	var l *remote.Listing
	var err error
	name := func(e remote.Entry) string { return e.Name }
	switch {
	case hf.IsName(prefix):
		n, bad := hf.Parse(strings.TrimSuffix(prefix, ":"))
		if bad != nil {
			return nil
		}
		repo := hf.Name{Repo: n.Repo, Revision: n.Revision}
		if n.File != "" || strings.HasSuffix(prefix, "/") {
			name = func(e remote.Entry) string { return repo.String() + "/" + e.File }
		}
		l, err = o.List(ctx, repo.String())
	case ollama.IsName(prefix):
		l, err = o.List(ctx, "ollama:")
	case oci.IsName(prefix):
		artifact, _, inside := strings.Cut(prefix, "#")
		if i := strings.IndexByte(artifact[strings.LastIndexByte(artifact, '/'):], ':'); i >= 0 && !inside { // up to the tag
			artifact = artifact[:strings.LastIndexByte(artifact, '/')+i]
		}
		n, bad := oci.Parse(artifact)
		registry, none := o.oci()
		if bad != nil || none != nil {
			return nil
		}
		l, err = registry.List(ctx, n)
	case s3.IsName(prefix):
		n, bad := s3.Parse(prefix)
		if bad != nil {
			return nil
		}
		store, none := o.bucketStore(n)
		if none != nil {
			return nil
		}
		l, err = store.List(ctx, n)
	}
	if err != nil || l == nil {
		return nil
	}
	var names []string
	for _, e := range l.Entries {
		names = append(names, name(e))
	}
	return names
}
