package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

const (
	// firstBytes is what the first request for a file asks for: as much as is read of a header at first.
	firstBytes = 1 << 20
	// maxRedirects is how often a request may be redirected.
	maxRedirects = 10
)

// file is a file on a server. It implements [gguf.Source].
type file struct {
	c     *Client
	a     *address
	path  string                 // the address without secrets
	first atomic.Pointer[reader] // of the file's beginning, until somebody asks for that

	// place is where requests were redirected to, so that not every range takes the long way; nil: nowhere, or not
	// known. Such addresses often expire.
	place atomic.Pointer[place]

	mu sync.Mutex
	id *identity // what every reply must agree with; set by the first one
}

var _ gguf.Source = (*file)(nil)

// openFile asks for the beginning of a file, and learns its size from the reply.
func (c *Client) openFile(ctx context.Context, a *address) (*file, error) {
	f := &file{c: c, a: a, path: redact(&a.url)}
	r := &reader{f: f, ctx: ctx, end: firstBytes, tries: min(c.o.Attempts, openAttempts)}
	if err := r.connect(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	f.first.Store(r)
	return f, nil
}

// Path returns the address without secrets.
func (f *file) Path() string { return f.path }

// Size returns the size of the file in bytes, and 0 before the first reply.
func (f *file) Size() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.id == nil {
		return 0
	}
	return f.id.size
}

// Range returns a reader of n bytes from off on. See [gguf.Source].
func (f *file) Range(ctx context.Context, off, n int64) io.ReadCloser {
	if off == 0 {
		if r := f.first.Swap(nil); r != nil {
			if n <= r.end {
				r.end = n
				return r
			}
			_ = r.Close()
		}
	}
	return &reader{f: f, ctx: ctx, off: off, end: off + n, tries: f.c.o.Attempts}
}

// Close closes the file. Its readers must be closed before.
func (f *file) Close() error {
	if r := f.first.Swap(nil); r != nil {
		return r.Close()
	}
	return nil
}

// get asks for the bytes from off up to end of the file, follows redirects, and checks the reply. The reply holds the
// bytes from off up to the returned to, which is end or less. The caller must close its body.
func (f *file) get(ctx context.Context, off, end int64) (resp *http.Response, to int64, err error) {
	header := http.Header{
		"Range":           {fmt.Sprintf("bytes=%d-%d", off, end-1)},
		"Accept":          {"*/*"},
		"Accept-Encoding": {"identity"}, // a range of compressed data is no range of the file
		"User-Agent":      {"gguf2gpu"},
	}
	at := f.place.Load()
	known := at != nil // the file is there, or was a moment ago
	if !known {
		at = &place{url: &f.a.url}
	}
	for range maxRedirects + 1 {
		resp, err := f.c.send(ctx, http.MethodGet, f.a, at.url, header)
		if err != nil {
			if known {
				f.place.CompareAndSwap(at, nil)
			}
			return nil, 0, err
		}
		if redirects(resp.StatusCode) {
			next, err := f.redirect(resp, at)
			_ = resp.Body.Close()
			if err != nil {
				return nil, 0, err
			}
			at, known = next, false
			continue
		}
		if to, err = f.check(resp, at, off, end); err != nil {
			_ = resp.Body.Close()
			if s, ok := errors.AsType[*StatusError](err); ok && known && s.refused() { // the address may have expired
				f.place.CompareAndSwap(at, nil)
				at, known = &place{url: &f.a.url}, false
				continue
			}
			return nil, 0, err
		}
		if at.url != &f.a.url && !known {
			f.place.Store(at)
		}
		return resp, to, nil
	}
	return nil, 0, fmt.Errorf("%w: more than %d redirects", ErrReply, maxRedirects)
}

// redirects reports whether a status is a redirect to the Location of the reply.
func redirects(code int) bool {
	switch code {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect,
		http.StatusPermanentRedirect:
		return true
	}
	return false
}

// redirect returns the place that a reply from another place redirects to.
func (f *file) redirect(resp *http.Response, from *place) (*place, error) {
	to, err := resp.Location()
	if err != nil { // whose text may show secrets
		return nil, fmt.Errorf("%w: a redirect to nowhere", ErrReply)
	}
	if err := f.a.checkRedirect(to); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrReply, err)
	}
	return &place{url: to, linked: linkedTag(resp.Header, from.linked)}, nil
}

// statusError returns the error of a reply with a status that means failure.
func (f *file) statusError(resp *http.Response) error {
	return &StatusError{
		Code: resp.StatusCode, Authorized: f.a.authorized(), Reason: reason(resp, f.c.o.Stall),
		after: retryAfter(resp.Header.Get("Retry-After"), time.Now()),
	}
}

// pageError returns the error of a reply that is a web page.
func (f *file) pageError() error {
	if to := pageFile(&f.a.url); to != "" {
		return fmt.Errorf("%w; the file may be at %s", ErrPage, to)
	}
	return fmt.Errorf("%w; the address of the file itself is needed, or a token", ErrPage)
}
