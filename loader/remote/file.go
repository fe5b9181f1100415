package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// firstBytes is what the first request for a file asks for: as much as is read of a header at first.
	firstBytes = 1 << 20
	// maxRedirects is how often a request may be sent elsewhere.
	maxRedirects = 10
)

// file is a file on a server: a gguf.Source.
type file struct {
	c     *Client
	a     *address
	path  string
	id    *identity              // what every reply has to say about the file; set by the first
	first atomic.Pointer[reader] // of the file's beginning, until somebody asks for that
	// target is where requests were redirected to, so that not every range takes the long way. Such addresses often expire.
	target atomic.Pointer[url.URL]
}

// identity tells a file from what it is after a change.
type identity struct {
	size           int64
	etag, modified string
}

// openFile asks for the beginning of a file and finds out how large it is.
func (c *Client) openFile(ctx context.Context, a *address) (*file, error) {
	f := &file{c: c, a: a, path: redact(&a.url)}
	r := &reader{f: f, ctx: ctx, end: firstBytes, tries: min(c.o.Attempts, openAttempts)}
	if err := r.connect(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	f.first.Store(r)
	return f, nil
}

// Path is the address without secrets.
func (f *file) Path() string { return f.path }

// Size is that of the file in bytes.
func (f *file) Size() int64 { return f.id.size }

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

// Close closes the file, whose readers have to be closed before.
func (f *file) Close() error {
	if r := f.first.Swap(nil); r != nil {
		return r.Close()
	}
	return nil
}

// get asks for bytes off to end of the file, follows redirects and checks the reply. The caller must close its body.
func (f *file) get(ctx context.Context, off, end int64) (*http.Response, error) {
	header := http.Header{
		"Range":           {fmt.Sprintf("bytes=%d-%d", off, end-1)},
		"Accept":          {"*/*"},
		"Accept-Encoding": {"identity"}, // a range of what is compressed is none of the file
		"User-Agent":      {"gguf2gpu"},
	}
	u := f.target.Load()
	known := u != nil // where the file is, or was a moment ago
	if !known {
		u = &f.a.url
	}
	for range maxRedirects + 1 {
		resp, err := f.c.send(ctx, f.a, u, header)
		if err != nil {
			if known {
				f.target.CompareAndSwap(u, nil)
			}
			return nil, err
		}
		switch resp.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect,
			http.StatusPermanentRedirect:
			u, err = resp.Location()
			_ = resp.Body.Close()
			if err != nil { // whose text may show secrets
				return nil, fmt.Errorf("%w: a redirect to nowhere", ErrReply)
			}
			if err := f.a.mayRedirect(u); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrReply, err)
			}
			known = false
			continue
		}
		if err := f.check(resp, off, end); err != nil {
			_ = resp.Body.Close()
			if s, ok := errors.AsType[*StatusError](err); ok && known && s.refused() { // the address may have expired
				f.target.CompareAndSwap(u, nil)
				u, known = &f.a.url, false
				continue
			}
			return nil, err
		}
		if u != &f.a.url && !known {
			f.target.Store(u)
		}
		return resp, nil
	}
	return nil, fmt.Errorf("%w: more than %d redirects", ErrReply, maxRedirects)
}

// check holds a reply to what was asked for, and the file to what it was. The first reply of all says what that is.
func (f *file) check(resp *http.Response, off, end int64) error {
	id := identity{etag: resp.Header.Get("ETag"), modified: resp.Header.Get("Last-Modified")}
	var from, to int64
	switch code := resp.StatusCode; code {
	case http.StatusPartialContent:
		var err error
		if from, to, id.size, err = parseRange(resp.Header.Values("Content-Range")); err != nil {
			return err
		}
	case http.StatusRequestedRangeNotSatisfiable:
		size, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes */")
		n, err := strconv.ParseUint(size, 10, 63)
		switch {
		case !ok || err != nil:
			return &StatusError{Code: code}
		case f.id == nil && n == 0: // of an empty file, not even the beginning can be had
			f.id = &identity{}
			return nil
		case f.id != nil && int64(n) != f.id.size:
			return fmt.Errorf("%w: it has %d bytes, and had %d", ErrChanged, n, f.id.size)
		}
		return &StatusError{Code: code}
	case http.StatusOK:
		if f.id != nil && id.etag != f.id.etag {
			return f.changed(id)
		}
		return fmt.Errorf("%w: it sends the whole of something (%.100q)", ErrNoRanges, resp.Header.Get("Content-Type"))
	default:
		return f.status(resp)
	}
	if f.id == nil {
		end = min(end, id.size)
	}
	switch enc := resp.Header.Get("Content-Encoding"); {
	case enc != "" && !strings.EqualFold(enc, "identity"):
		return fmt.Errorf("%w: it is encoded as %.100q, though that was not accepted", ErrReply, enc)
	case f.id != nil && !id.same(f.id):
		return f.changed(id)
	case from != off || to != end:
		return fmt.Errorf("%w: it has bytes %d to %d", ErrReply, from, to)
	case resp.ContentLength >= 0 && resp.ContentLength != end-off:
		return fmt.Errorf("%w: its body has %d bytes", ErrReply, resp.ContentLength)
	}
	if f.id == nil {
		f.id = &id
	}
	return nil
}

// parseRange reads a Content-Range: the first byte, the one behind the last, and the size of the file.
func parseRange(values []string) (from, to, size int64, err error) {
	if len(values) != 1 {
		return 0, 0, 0, fmt.Errorf("%w: %d Content-Range headers", ErrReply, len(values))
	}
	text, ok := strings.CutPrefix(values[0], "bytes ")
	span, total, ok2 := strings.Cut(text, "/")
	first, last, ok3 := strings.Cut(span, "-")
	a, err1 := strconv.ParseUint(first, 10, 62)
	b, err2 := strconv.ParseUint(last, 10, 62)
	n, err3 := strconv.ParseUint(total, 10, 62)
	if !ok || !ok2 || !ok3 || errors.Join(err1, err2, err3) != nil || a > b || b >= n {
		return 0, 0, 0, fmt.Errorf("%w: its Content-Range is %.100q", ErrReply, values[0])
	}
	return int64(a), int64(b) + 1, int64(n), nil
}

// same reports whether a file has not changed, as far as one can tell.
func (id identity) same(as *identity) bool {
	if id.size != as.size || id.etag != as.etag {
		return false
	}
	return id.etag != "" || id.modified == as.modified
}

// changed says in what a file differs from what it was.
func (f *file) changed(id identity) error {
	switch was := f.id; {
	case id.etag != was.etag:
		return fmt.Errorf("%w: its ETag is %.100q, and was %.100q", ErrChanged, id.etag, was.etag)
	case id.size != was.size:
		return fmt.Errorf("%w: it has %d bytes, and had %d", ErrChanged, id.size, was.size)
	}
	return fmt.Errorf("%w: it is of %.100q, and was of %.100q", ErrChanged, id.modified, f.id.modified)
}

// status is the error of a reply that is none.
func (f *file) status(resp *http.Response) error {
	e := &StatusError{Code: resp.StatusCode, after: retryAfter(resp.Header.Get("Retry-After"), time.Now())}
	switch {
	case e.Code != http.StatusUnauthorized && e.Code != http.StatusForbidden:
	case f.a.auth != "":
		e.hint = "; the credentials were not accepted"
	default:
		e.hint = "; a token can be given in GGUF2GPU_TOKEN, for huggingface.co in HF_TOKEN"
	}
	return e
}

// retryAfter reads a Retry-After header: seconds, or a date.
func retryAfter(s string, now time.Time) time.Duration {
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	if at, err := http.ParseTime(s); err == nil {
		return max(0, at.Sub(now))
	}
	return 0
}
