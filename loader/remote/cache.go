package remote

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// cachePath is where the cache keeps a file; "" if nothing tells it from what it is after a change. id is what a first
// reply said; nil: there was none yet, and only a digest helps.
func (c *Client) cachePath(a *address, id *Identity) string {
	switch {
	case c.o.Cache == "":
		return ""
	case a.digest != "":
		return filepath.Join(c.o.Cache, strings.Replace(a.digest, ":", "-", 1))
	case id == nil || id.ETag == "":
		return ""
	case id.Digest != "":
		return filepath.Join(c.o.Cache, strings.Replace(id.Digest, ":", "-", 1))
	}
	key := sha256.Sum256(fmt.Appendf(nil, "%s\n%s\n%d", id.URL, id.ETag, id.Size))
	return filepath.Join(c.o.Cache, fmt.Sprintf("etag-%x", key))
}

// cached returns what the cache has of a file; nil if that is nothing.
func (c *Client) cached(a *address, id *Identity, fails *failure) (gguf.Source, error) {
	path := c.cachePath(a, id)
	if path == "" {
		return nil, nil
	}
	known := Identity{URL: redact(&a.url), Digest: a.digest, Revision: a.revision}
	if id != nil {
		known = *id
	}
	d, err := newDisk(path, known)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case a.size > 0 && d.Size() != a.size || id != nil && d.Size() != id.Size: // nothing that was ever kept
		return nil, d.Close()
	}
	if err := a.expected.sized(known.URL, d.Size()); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	if !c.always(a) || known.Digest == "" {
		return d, nil
	}
	s := newChecked(d, known.Digest, fails)
	s.always = true
	return s, nil
}

// keep makes s write what it reads to the cache.
func (c *Client) keep(s *checked, a *address, id *Identity) error {
	path := c.cachePath(a, id)
	if path == "" {
		return nil
	}
	if err := os.MkdirAll(c.o.Cache, 0o700); err != nil { // others need not see what a private model is
		return err
	}
	f, err := os.CreateTemp(c.o.Cache, filepath.Base(path)+".*.part")
	if err != nil {
		return err
	}
	s.keeper = &keeper{file: f, path: path, size: s.Size()}
	if s.digest != nil {
		s.digest.fetch = s.keeper.orFrom(s.Source)
	}
	return nil
}

// keeper writes a file that is read to the cache. It gets its name when it is complete.
type keeper struct {
	file *os.File
	path string
	size int64

	mu   sync.Mutex
	have []span // that are written: in order, with gaps between them
	err  error  // the first of writing; nothing is written after it
	done bool   // the file has its name
}

// span is the bytes from off up to end.
type span struct{ off, end int64 }

// write writes what was read at off. An error shows in complete.
func (k *keeper) write(off int64, b []byte) {
	k.mu.Lock()
	err, done := k.err, k.done
	k.mu.Unlock()
	if err != nil || done {
		return
	}
	_, err = k.file.WriteAt(b, off)
	k.mu.Lock()
	defer k.mu.Unlock()
	if err != nil {
		k.err = err
		return
	}
	k.have = addSpan(k.have, span{off, off + int64(len(b))})
}

// addSpan adds s to all, and joins what touches.
func addSpan(all []span, s span) []span {
	i, _ := slices.BinarySearchFunc(all, s.off, func(x span, off int64) int {
		if x.end < off {
			return -1
		}
		return 1
	})
	j := i
	for ; j < len(all) && all[j].off <= s.end; j++ {
		s.off, s.end = min(s.off, all[j].off), max(s.end, all[j].end)
	}
	return slices.Replace(all, i, j, s)
}

// missing returns the spans that were not written.
func (k *keeper) missing() (all []span, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	at := int64(0)
	for _, s := range k.have {
		if at < s.off {
			all = append(all, span{at, s.off})
		}
		at = s.end
	}
	if at < k.size {
		all = append(all, span{at, k.size})
	}
	return all, k.err
}

// complete reads, by way of s, what is missing.
func (k *keeper) complete(ctx context.Context, s gguf.Source) error {
	all, err := k.missing()
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(fetchers)
	for _, m := range all {
		for off := m.off; off < m.end; off += checkedRange {
			n := min(checkedRange, m.end-off)
			g.Go(func() error {
				r := s.Range(ctx, off, n)
				_, err := io.Copy(io.Discard, r)
				return errors.Join(err, r.Close())
			})
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if all, err = k.missing(); err == nil && len(all) > 0 {
		err = fmt.Errorf("%s: %w", k.path, io.ErrUnexpectedEOF)
	}
	return err
}

// commit gives the file its name.
func (k *keeper) commit() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.done {
		return nil
	}
	if err := k.file.Sync(); err != nil {
		return err
	}
	if err := os.Rename(k.file.Name(), k.path); err != nil {
		return err
	}
	k.done = true
	return nil
}

// close removes the file if it is not complete.
func (k *keeper) close() error {
	err := k.file.Close()
	if !k.done {
		err = errors.Join(err, os.Remove(k.file.Name()))
	}
	return err
}

// orFrom returns a function that reads ranges from what was written, or else from s.
func (k *keeper) orFrom(s gguf.Source) func(ctx context.Context, off, n int64) io.ReadCloser {
	return func(ctx context.Context, off, n int64) io.ReadCloser {
		k.mu.Lock()
		written := slices.ContainsFunc(k.have, func(x span) bool { return x.off <= off && off+n <= x.end })
		k.mu.Unlock()
		if written {
			return io.NopCloser(io.NewSectionReader(k.file, off, n))
		}
		return s.Range(ctx, off, n)
	}
}
