package remote

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"strings"
	"testing"
)

// TestWrongReplies: what is wrong with a reply is an error at once, that of the first as that of a later one.
func TestWrongReplies(t *testing.T) {
	t.Parallel()
	data := random(2 << 20)
	s := newSite(t, data)
	head := func(w http.ResponseWriter, from, to, size int64) {
		w.Header().Set("ETag", etag)
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, size))
		w.Header().Set("Content-Length", strconv.FormatInt(to-from, 10))
		w.WriteHeader(http.StatusPartialContent)
	}
	whole := func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Range")
		s.serve(w, r)
	}
	size := int64(len(data))
	tests := []struct {
		name  string
		is    error
		text  string
		reply func(w http.ResponseWriter, r *http.Request, from, to int64)
	}{
		{"no ranges", ErrNoRanges, "does not support ranges", func(w http.ResponseWriter, r *http.Request, _,
			_ int64,
		) {
			whole(w, r)
		}},
		{"a page", ErrPage, "a web page", func(w http.ResponseWriter, _ *http.Request, _, _ int64) {
			w.Header().Set("ETag", etag)
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<html>please log in</html>")
		}},
		{"no content", ErrReply, "", func(w http.ResponseWriter, _ *http.Request, _,
			_ int64,
		) {
			w.WriteHeader(http.StatusPartialContent)
		}},
		{"no size", ErrReply, "Content-Range", func(w http.ResponseWriter, _ *http.Request, from, to int64) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/*", from, to-1))
			w.WriteHeader(http.StatusPartialContent)
		}},
		{"nonsense", ErrReply, "Content-Range", func(w http.ResponseWriter, _ *http.Request, _, _ int64) {
			w.Header().Set("Content-Range", "bytes 5-4/3")
			w.WriteHeader(http.StatusPartialContent)
		}},
		{"negative", ErrReply, "Content-Range", func(w http.ResponseWriter, _ *http.Request, _, _ int64) {
			w.Header().Set("Content-Range", "bytes -5-4/-3")
			w.WriteHeader(http.StatusPartialContent)
		}},
		{"two", ErrReply, "2 Content-Range", func(w http.ResponseWriter, _ *http.Request, from, to int64) {
			w.Header().Add("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, size))
			w.Header().Add("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, size+1))
			w.WriteHeader(http.StatusPartialContent)
		}},
		{"several ranges", ErrReply, "Content-Range", func(w http.ResponseWriter, _ *http.Request, _, _ int64) {
			w.Header().Set("Content-Type", "multipart/byteranges; boundary=x")
			w.WriteHeader(http.StatusPartialContent)
		}},
		{"another beginning", ErrReply, "it has bytes", func(w http.ResponseWriter, _ *http.Request, from, to int64) {
			head(w, from+1, to, size)
		}},
		{"a later end", ErrReply, "it has bytes", func(w http.ResponseWriter, _ *http.Request, from, to int64) {
			head(w, from, to+1, size)
		}},
		{"a longer body", ErrReply, "its body has", func(w http.ResponseWriter, _ *http.Request, from, to int64) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, size))
			w.Header().Set("ETag", etag)
			w.Header().Set("Content-Length", strconv.FormatInt(to-from+1, 10))
			w.WriteHeader(http.StatusPartialContent)
		}},
		{"an endless body", ErrReply, "longer", func(w http.ResponseWriter, r *http.Request, from, to int64) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, size))
			w.Header().Set("ETag", etag)
			w.WriteHeader(http.StatusPartialContent)
			for r.Context().Err() == nil {
				w.Write(data[:1<<16])
			}
		}},
		{"compressed", ErrReply, "gzip", func(w http.ResponseWriter, _ *http.Request, from, to int64) {
			w.Header().Set("Content-Encoding", "gzip")
			var b bytes.Buffer
			z := gzip.NewWriter(&b)
			z.Write(data[from:to])
			z.Close()
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, size))
			w.Header().Set("ETag", etag)
			w.WriteHeader(http.StatusPartialContent)
			w.Write(b.Bytes())
		}},
		{"huge headers", nil, "", func(w http.ResponseWriter, _ *http.Request, _, _ int64) {
			hijack(w, "HTTP/1.1 206 Partial Content|X: "+strings.Repeat("x", 2*maxHeader), nil, false)
		}},
		{"not HTTP", nil, "", func(w http.ResponseWriter, _ *http.Request, _, _ int64) {
			hijack(w, "SSH-2.0-OpenSSH_9", nil,
				false)
		}},
		{"nothing at all", nil, "", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { hijack(w, "", nil, true) }},
		{"not found", fs.ErrNotExist, "404 Not Found", func(w http.ResponseWriter, _ *http.Request, _,
			_ int64,
		) {
			w.WriteHeader(404)
		}},
		{"gone", fs.ErrNotExist, "410 Gone", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { w.WriteHeader(410) }},
		{"not allowed", fs.ErrPermission, "no token is known for this host", func(w http.ResponseWriter, _ *http.Request, _,
			_ int64,
		) {
			w.WriteHeader(401)
		}},
		{"forbidden", fs.ErrPermission, "403 Forbidden", func(w http.ResponseWriter, _ *http.Request, _,
			_ int64,
		) {
			w.WriteHeader(403)
		}},
		{"teapot", nil, "418", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { w.WriteHeader(418) }},
		{"beyond the end", nil, "416", func(w http.ResponseWriter, _ *http.Request, _, _ int64) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
			w.WriteHeader(416)
		}},
		{"broken", nil, "500 Internal Server Error (after 4 attempts)", func(w http.ResponseWriter, _ *http.Request, _,
			_ int64,
		) {
			w.WriteHeader(500)
		}},
		{"busy", nil, "in 1h0m0s", func(w http.ResponseWriter, _ *http.Request, _, _ int64) {
			w.Header().Set("Retry-After", "3600")
			w.WriteHeader(429)
		}},
	}
	for _, tt := range tests {
		for _, later := range []bool{false, true} {
			name := fmt.Sprintf("%s, later %t", tt.name, later)
			c := newClient(t, quick())
			fault := func(w http.ResponseWriter, r *http.Request, _ int) bool {
				from, to := asked(r)
				tt.reply(w, r, from, to)
				return true
			}
			if !later {
				s.setFault(fault)
				f, err := openTestFile(t, c, s.URL+"/m.gguf?secret=1")
				if err == nil { // the body is what is wrong
					_, err = readRange(t, f, 0, firstBytes)
				}
				wantError(t, name, err, tt.is, tt.text, " to 1048576: ")
				continue
			}
			s.setFault(nil)
			f := mustOpen(t, c, s.URL+"/m.gguf?secret=1")
			wantRange(t, f, data, 0, firstBytes)
			s.setFault(fault)
			_, err := readRange(t, f, 7, 1<<20)
			wantError(t, name, err, tt.is, tt.text)
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("%s: %v", name, err)
			}
			// Faults that may pass have been tried again, others have not.
			e, _ := errors.AsType[*Error](err)
			final := errors.Is(err, ErrReply) || errors.Is(err, ErrNoRanges) || errors.Is(err, ErrPage) ||
				errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
			n := len(s.requests())
			if tt.name == "nothing at all" {
				n-- // the transport itself asks again where a connection that was kept turns out to be closed
			}
			if e != nil && (e.Attempts != n || final && n != 1) {
				t.Errorf("%s: %d requests, %d attempts are told", name, n, e.Attempts)
			}
		}
	}
}

// TestChanges: a file that becomes another one between two ranges is noticed.
func TestChanges(t *testing.T) {
	t.Parallel()
	data := random(2 << 20)
	s := newSite(t, data)
	modified := "Tue, 14 Nov 2023 22:13:20 GMT"
	serve := func(tag, date string, size int) func(w http.ResponseWriter, r *http.Request, _ int) bool {
		return func(w http.ResponseWriter, r *http.Request, _ int) bool {
			w.Header().Set("ETag", tag)
			if tag == "" {
				w.Header().Del("ETag")
			}
			at, _ := http.ParseTime(date)
			http.ServeContent(w, r, "", at, bytes.NewReader(data[:size]))
			return true
		}
	}
	ifWhole := func(f func(w http.ResponseWriter, r *http.Request, n int) bool) func(w http.ResponseWriter,
		r *http.Request, n int) bool {
		return func(w http.ResponseWriter, r *http.Request, n int) bool {
			r.Header.Del("Range")
			return f(w, r, n)
		}
	}
	for _, tt := range []struct {
		name, text    string
		before, after func(w http.ResponseWriter, r *http.Request, n int) bool
	}{
		{"ETag", "ETag", serve(`"a"`, modified, 2<<20), serve(`"b"`, modified, 2<<20)},
		{"ETag without ranges", "ETag", serve(`"a"`, modified, 2<<20), ifWhole(serve(`"b"`, modified, 2<<20))},
		{"ETag gone", "ETag", serve(`"a"`, modified, 2<<20), serve("", modified, 2<<20)},
		{"size", "2097151 bytes", serve(`"a"`, modified, 2<<20), serve(`"a"`, modified, 2<<20-1)},
		{"size below the range", "1000 bytes", serve(`"a"`, modified, 2<<20), serve(`"a"`, modified, 1000)},
		{"date", "15 Nov", serve("", modified, 2<<20), serve("", "Wed, 15 Nov 2023 22:13:20 GMT", 2<<20)},
		{"", "", serve(`W/"a"`, modified, 2<<20), serve(`W/"a"`, modified, 2<<20)},
	} {
		c := newClient(t, quick())
		s.setFault(tt.before)
		f := mustOpen(t, c, s.URL)
		s.setFault(tt.after)
		_, err := readRange(t, f, 1<<20, 1<<19)
		if tt.name == "" && err != nil {
			t.Error(err)
		} else if tt.name != "" {
			wantError(t, tt.name, err, ErrChanged, tt.text, "bytes 1048576 to 1572864")
		}
	}
}
