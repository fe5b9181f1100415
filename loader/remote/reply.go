package remote

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// place is where a file is, or where a request for it was redirected to.
type place struct {
	url    *url.URL
	linked string // the X-Linked-ETag of the redirects on the way there; "" if there was none
}

// identity is what is known of a file, to tell it from what it is after a change. The fields about the content are the
// same on all servers that have the file. Each is empty as long as it is not known.
type identity struct {
	size    int64
	linked  string            // X-Linked-ETag, which huggingface.co sends when it redirects to a server that has the file
	digests map[string]string // of the whole file, by the header that has it

	first validator // of the server that the first reply came from

	// Each server has ETags and dates of its own. A later redirect may lead to another server than an earlier one.
	seen map[string]validator // by the file's address there, without query
}

// validator is what a server says about its version of a file.
type validator struct{ etag, modified string }

// maxSeen limits how many servers' validators are kept.
const maxSeen = 64

// digestHeaders are the headers that may hold a digest of the whole file.
var digestHeaders = []string{"Repr-Digest", "Digest", "X-Goog-Hash"}

// identify returns what a reply from a place says about the file. The size is left to the caller.
func identify(resp *http.Response, at *place) identity {
	v := validator{strongTag(resp.Header.Get("ETag")), resp.Header.Get("Last-Modified")}
	id := identity{
		linked: at.linked, first: v, digests: map[string]string{}, seen: map[string]validator{redactPath(at.url): v},
	}
	for _, name := range digestHeaders {
		if values := resp.Header.Values(name); len(values) > 0 {
			all := strings.Split(strings.ReplaceAll(strings.Join(values, ","), " ", ""), ",")
			slices.Sort(all)
			id.digests[name] = strings.Join(all, ",")
		}
	}
	return id
}

// strongTag returns an ETag without the sign that it is a weak one. Caches on the way make weak ones of strong ones,
// and both name the same file.
func strongTag(tag string) string { return strings.TrimPrefix(strings.TrimSpace(tag), "W/") }

// linkedTag returns the X-Linked-ETag of a redirect, or that of the redirects before it.
func linkedTag(h http.Header, before string) string {
	if tag := strongTag(h.Get("X-Linked-ETag")); tag != "" {
		return tag
	}
	return before
}

// check compares a reply from a place with what was asked for, the bytes from off up to end, and with what is known of
// the file. The first reply of all is what the others are compared with. The reply holds the bytes up to the returned
// to.
func (f *file) check(resp *http.Response, at *place, off, end int64) (to int64, err error) {
	id := identify(resp, at)
	var from int64
	switch resp.StatusCode {
	case http.StatusPartialContent:
		if from, to, id.size, err = parseRange(resp.Header.Values("Content-Range")); err != nil {
			return 0, err
		}
	case http.StatusRequestedRangeNotSatisfiable:
		return 0, f.unsatisfiable(resp)
	case http.StatusOK:
		return 0, f.whole(resp, id)
	default:
		return 0, f.statusError(resp)
	}
	if enc := resp.Header.Values("Content-Encoding"); encoded(enc) {
		return 0, fmt.Errorf("%w: it is encoded as %.100q, though that was not accepted", ErrReply, enc)
	}
	if f.a.size > 0 && id.size != f.a.size {
		return 0, fmt.Errorf("%w: the file has %d bytes, and should have %d", ErrReply, id.size, f.a.size)
	}
	if digits := strings.Trim(id.linked, `"`); len(digits) == sha256.Size*2 && strings.HasPrefix(f.a.digest, "sha256:") &&
		f.a.digest != "sha256:"+digits {
		return 0, fmt.Errorf("%w: its X-Linked-ETag is %.100q, and should be that of %s", ErrChanged, id.linked, f.a.digest)
	}
	if err := f.compare(id); err != nil {
		return 0, err
	}
	switch {
	case from != off || to > end:
		return 0, fmt.Errorf("%w: it has bytes %d to %d", ErrReply, from, to)
	case resp.ContentLength >= 0 && resp.ContentLength != to-off:
		return 0, fmt.Errorf("%w: its body has %d bytes", ErrReply, resp.ContentLength)
	}
	f.learn(id)
	return to, nil
}

// compare returns an error if a reply tells that the file is not what it was.
func (f *file) compare(id identity) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.id == nil {
		return nil
	}
	return f.id.differs(id)
}

// learn adds what a reply says to what is known of the file.
func (f *file) learn(id identity) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.id == nil {
		f.id = &id
		return
	}
	for where, v := range id.seen {
		if _, known := f.id.seen[where]; known {
			continue
		}
		if f.id.onlySize(id) {
			f.c.o.Logger.Warn("another server sends the file now; nothing but its size tells whether it is the same",
				"url", f.path, "from", where)
		}
		if len(f.id.seen) >= maxSeen {
			clear(f.id.seen)
		}
		f.id.seen[where] = v
	}
	f.id.linked = cmp.Or(f.id.linked, id.linked)
	maps.Copy(f.id.digests, id.digests)
}

// onlySize reports whether two servers say nothing of a file but its size that can be compared.
func (id *identity) onlySize(now identity) bool {
	for name, d := range now.digests {
		if id.digests[name] == d {
			return false
		}
	}
	for _, v := range now.seen {
		for _, was := range id.seen {
			if was.etag == v.etag && v.etag != "" {
				return false
			}
		}
	}
	return id.linked == "" || now.linked == ""
}

// differs returns an error if a file that was id is another one now, as far as can be seen.
func (id *identity) differs(now identity) error {
	changed := func(what string, now, was any) error {
		return fmt.Errorf("%w: its %s is %.100q, and was %.100q", ErrChanged, what, now, was)
	}
	if id.size != now.size {
		return fmt.Errorf("%w: it has %d bytes, and had %d", ErrChanged, now.size, id.size)
	}
	if id.linked != "" && now.linked != "" && id.linked != now.linked {
		return changed("X-Linked-ETag", now.linked, id.linked)
	}
	for name, d := range now.digests {
		if was := id.digests[name]; was != "" && was != d {
			return changed(name, d, was)
		}
	}
	for where, v := range now.seen {
		switch was, known := id.seen[where]; {
		case !known:
		case was.etag != v.etag:
			return changed("ETag", v.etag, was.etag)
		case v.etag == "" && was.modified != v.modified:
			return changed("date", v.modified, was.modified)
		}
	}
	return nil
}

// unsatisfiable returns the error of a reply that says that the file does not have the bytes asked for. It returns nil
// for a file that is empty, of which not even the beginning can be asked for.
func (f *file) unsatisfiable(resp *http.Response) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	span, size, ok := strings.Cut(rangeOf(resp.Header.Get("Content-Range")), "/")
	n, err := strconv.ParseUint(size, 10, 63)
	switch {
	case !ok || err != nil || span != "*":
		return &StatusError{Code: resp.StatusCode}
	case f.id == nil && n == 0:
		f.id = &identity{digests: map[string]string{}, seen: map[string]validator{}}
		return nil
	case f.id != nil && int64(n) != f.id.size:
		return fmt.Errorf("%w: it has %d bytes, and had %d", ErrChanged, n, f.id.size)
	}
	return &StatusError{Code: resp.StatusCode}
}

// whole returns the error of a reply that is not a range.
func (f *file) whole(resp *http.Response, id identity) error {
	kind := resp.Header.Get("Content-Type")
	if media, _, _ := mime.ParseMediaType(kind); media == "text/html" || media == "application/xhtml+xml" {
		return f.pageError()
	}
	id.size = f.Size() // which a reply of this kind need not tell
	if err := f.compare(id); err != nil {
		return err
	}
	return fmt.Errorf("%w: it sends the whole of something (%.100q)", ErrNoRanges, kind)
}

// encoded reports whether Content-Encoding headers name an encoding of the body. Some stores name things that are none:
// aws-chunked is how the file was sent to the store, the others are character sets and the like.
func encoded(values []string) bool {
	for _, list := range values {
		for coding := range strings.SplitSeq(list, ",") {
			switch strings.ToLower(strings.TrimSpace(coding)) {
			case "", "identity", "none", "aws-chunked", "utf-8", "binary":
			default:
				return true
			}
		}
	}
	return false
}

// rangeOf returns a Content-Range without its unit, which must be bytes, in upper or lower case. It returns "" for
// others. Behind the unit belongs a space; some servers write more of them, or = as in a request.
func rangeOf(value string) string {
	value = strings.TrimSpace(value)
	i := strings.IndexAny(value, " =")
	if i < 0 || !strings.EqualFold(value[:i], "bytes") {
		return ""
	}
	return strings.TrimSpace(value[i+1:])
}

// parseRange reads the Content-Range headers of a reply: the first byte, the one behind the last, and the size of the
// file.
func parseRange(values []string) (from, to, size int64, err error) {
	if len(values) != 1 {
		return 0, 0, 0, fmt.Errorf("%w: %d Content-Range headers", ErrReply, len(values))
	}
	span, total, ok := strings.Cut(rangeOf(values[0]), "/")
	first, last, ok2 := strings.Cut(span, "-")
	a, err1 := strconv.ParseUint(first, 10, 62)
	b, err2 := strconv.ParseUint(last, 10, 62)
	n, err3 := strconv.ParseUint(total, 10, 62)
	if !ok || !ok2 || errors.Join(err1, err2, err3) != nil || a > b || b >= n {
		return 0, 0, 0, fmt.Errorf("%w: its Content-Range is %.100q", ErrReply, values[0])
	}
	return int64(a), int64(b) + 1, int64(n), nil
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
