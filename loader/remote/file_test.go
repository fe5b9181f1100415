package remote

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestRanges(t *testing.T) {
	data := random(3 << 20)
	s := newSite(t, data)
	c := newClient(t, quick())
	f := mustOpen(t, c, s.URL+"/dir/m.gguf")
	if f.Size() != int64(len(data)) || f.Path() != s.URL+"/dir/m.gguf" {
		t.Errorf("%d bytes at %s", f.Size(), f.Path())
	}
	wantRange(t, f, data, 0, firstBytes)
	for _, r := range [][2]int64{{0, 1}, {0, firstBytes}, {12345, 1 << 20}, {int64(len(data)) - 1, 1}, {1, int64(len(data)) - 1}, {0, int64(len(data))}} {
		wantRange(t, f, data, r[0], r[1])
	}
	if n := s.conns.Load(); n != 1 {
		t.Errorf("%d connections for ranges one after the other, want 1", n)
	}
	if got, want := c.Stats(), (Stats{Requests: 7, Bytes: firstBytes + 1 + firstBytes + 1<<20 + 1 + 2*int64(len(data)) - 1}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if r := f.Range(t.Context(), 5, 0); true {
		if b, err := io.ReadAll(r); len(b) != 0 || err != nil {
			t.Errorf("an empty range: %d bytes, %v", len(b), err)
		}
		r.Close()
		if _, err := r.Read(make([]byte, 1)); err == nil {
			t.Error("a closed reader reads")
		}
	}
}

// TestFirstRangeIsUsed: the first reply's body is the beginning that is read next, also when only a part of it is.
func TestFirstRangeIsUsed(t *testing.T) {
	data := random(firstBytes + 1000)
	s := newSite(t, data)
	for _, n := range []int64{1, 1000, firstBytes} {
		c := newClient(t, quick())
		f := mustOpen(t, c, s.URL)
		wantRange(t, f, data, 0, n)
		if got := c.Stats().Requests; got != 1 {
			t.Errorf("%d requests for %d bytes", got, n)
		}
	}
	c := newClient(t, quick())
	f := mustOpen(t, c, s.URL)
	wantRange(t, f, data, 0, firstBytes+1)
}

// TestParallel reads ranges at the same time, each on a connection of HTTP/1.1, though the server speaks HTTP/2 as well.
func TestParallel(t *testing.T) {
	data := random(4 << 20)
	s := newSite(t, data)
	s.Server.Close()
	tls := newTLS(t, s)
	o := quick()
	o.TLS = trusting(tls)
	c := newClient(t, o)
	f := mustOpen(t, c, tls.URL)
	var all sync.WaitGroup
	for i := range int64(8) {
		all.Go(func() {
			for k := range int64(4) {
				wantRange(t, f, data, i<<19+k<<17, 1<<17)
			}
		})
	}
	all.Wait()
	for _, r := range s.requests() {
		if r.Proto != "HTTP/1.1" {
			t.Fatalf("%s is spoken", r.Proto)
		}
	}
}

// TestWrongReplies: what is wrong with a reply is an error at once, that of the first as that of a later one.
func TestWrongReplies(t *testing.T) {
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
		{"no ranges", ErrNoRanges, "does not support ranges", func(w http.ResponseWriter, r *http.Request, _, _ int64) { whole(w, r) }},
		{"a page", ErrNoRanges, "text/html", func(w http.ResponseWriter, _ *http.Request, _, _ int64) {
			w.Header().Set("ETag", etag)
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<html>please log in</html>")
		}},
		{"no content", ErrReply, "", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { w.WriteHeader(http.StatusPartialContent) }},
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
		{"another end", ErrReply, "it has bytes", func(w http.ResponseWriter, _ *http.Request, from, to int64) {
			head(w, from, to-1, size)
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
		{"not HTTP", nil, "", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { hijack(w, "SSH-2.0-OpenSSH_9", nil, false) }},
		{"nothing at all", nil, "", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { hijack(w, "", nil, true) }},
		{"not found", fs.ErrNotExist, "404 Not Found", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { w.WriteHeader(404) }},
		{"gone", fs.ErrNotExist, "410 Gone", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { w.WriteHeader(410) }},
		{"not allowed", fs.ErrPermission, "GGUF2GPU_TOKEN", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { w.WriteHeader(401) }},
		{"forbidden", fs.ErrPermission, "403 Forbidden", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { w.WriteHeader(403) }},
		{"teapot", nil, "418", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { w.WriteHeader(418) }},
		{"beyond the end", nil, "416", func(w http.ResponseWriter, _ *http.Request, _, _ int64) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
			w.WriteHeader(416)
		}},
		{"broken", nil, "500 Internal Server Error (after 4 attempts)", func(w http.ResponseWriter, _ *http.Request, _, _ int64) { w.WriteHeader(500) }},
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
			final := errors.Is(err, ErrReply) || errors.Is(err, ErrNoRanges) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
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
	ifWhole := func(f func(w http.ResponseWriter, r *http.Request, n int) bool) func(w http.ResponseWriter, r *http.Request, n int) bool {
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

// TestBrokenConnections: a range goes on from the byte that was reached, however its connections end.
func TestBrokenConnections(t *testing.T) {
	data := random(3 << 20)
	s := newSite(t, data)
	for _, reset := range []bool{false, true} {
		c := newClient(t, quick())
		s.setFault(nil)
		f := mustOpen(t, c, s.URL)
		const chop = 300_000
		s.setFault(func(w http.ResponseWriter, r *http.Request, n int) bool {
			from, to := asked(r)
			switch {
			case n%4 == 2: // breaks before anything comes
				hijack(w, "", nil, reset)
				return true
			case to-from <= chop:
				return false
			}
			hijack(w, fmt.Sprintf("HTTP/1.1 206 Partial Content|ETag: %s|Content-Length: %d|Content-Range: bytes %d-%d/%d|Last-Modified: x",
				etag, to-from, from, to-1, len(data)), data[from:from+chop], reset)
			return true
		})
		wantRange(t, f, data, 11, 2_000_000)
		next := int64(11)
		for _, r := range s.requests() {
			from, to := asked(r)
			if from < next || to != 2_000_011 {
				t.Errorf("bytes %d to %d were asked for when %d had come", from, to, next-11)
			}
			next = from
		}
		st := c.Stats()
		if n := len(s.requests()); st.Retries < 6 || int(st.Retries) != n-1 || int(st.Requests) != n+1 {
			t.Errorf("%d requests, %+v", n, st)
		}
	}
}

// TestGivesUp: attempts that bring nothing are counted from the last byte on.
func TestGivesUp(t *testing.T) {
	data := random(2 << 20)
	s := newSite(t, data)
	c := newClient(t, quick())
	f := mustOpen(t, c, s.URL)
	s.setFault(func(w http.ResponseWriter, r *http.Request, n int) bool {
		from, to := asked(r)
		if n > 3 {
			hijack(w, "", nil, false)
			return true
		}
		hijack(w, fmt.Sprintf("HTTP/1.1 206 Partial Content|ETag: %s|Content-Length: %d|Content-Range: bytes %d-%d/%d",
			etag, to-from, from, to-1, len(data)), data[from:from+1000], false)
		return true
	})
	got, err := readRange(t, f, 100, 1<<20)
	if !bytes.Equal(got, data[100:3100]) {
		t.Errorf("%d bytes came", len(got))
	}
	wantError(t, "no more", err, io.EOF, "bytes 3100 to 1048676", "(after 4 attempts)")
	if n := len(s.requests()); n < 6 || n > 7 {
		t.Errorf("%d requests", n)
	}
}

// TestBusy: servers that ask for time get it.
func TestBusy(t *testing.T) {
	data := random(2 << 20)
	s := newSite(t, data)
	for _, code := range []int{408, 429, 500, 502, 503, 504} {
		c := newClient(t, quick())
		var at [2]time.Time
		s.setFault(func(w http.ResponseWriter, _ *http.Request, n int) bool {
			at[min(n, 2)-1] = time.Now()
			if n == 1 && code == 503 {
				w.Header().Set("Retry-After", "1")
			}
			if n == 1 {
				w.WriteHeader(code)
			}
			return n == 1
		})
		f := mustOpen(t, c, s.URL)
		wantRange(t, f, data, 0, firstBytes)
		if c.Stats().Retries != 1 {
			t.Errorf("%d: %+v", code, c.Stats())
		}
		if code == 503 && at[1].Sub(at[0]) < time.Second {
			t.Errorf("asked again after %v", at[1].Sub(at[0]))
		}
	}
	now := time.Unix(1_700_000_000, 0)
	for s, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, "-1": 0, "x": 0, "99999999999999": 0,
		now.Add(time.Minute).UTC().Format(http.TimeFormat): time.Minute, now.Add(-time.Minute).UTC().Format(http.TimeFormat): 0,
	} {
		if got := retryAfter(s, now); got != want {
			t.Errorf("Retry-After %q is %v, want %v", s, got, want)
		}
	}
}

// TestStalls: a server that stops sending, before its header, at its beginning or in the middle, is left and tried again.
func TestStalls(t *testing.T) {
	data := random(2 << 20)
	s := newSite(t, data)
	for _, after := range []int{-1, 0, 5000} {
		o := quick()
		o.Stall = 100 * time.Millisecond
		c := newClient(t, o)
		s.setFault(nil)
		f := mustOpen(t, c, s.URL)
		wantRange(t, f, data, 0, firstBytes)
		stall := func(w http.ResponseWriter, r *http.Request) {
			from, to := asked(r)
			if after >= 0 {
				w.Header().Set("ETag", etag)
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(data)))
				w.Header().Set("Content-Length", strconv.FormatInt(to-from, 10))
				w.WriteHeader(http.StatusPartialContent)
				w.Write(data[from : from+int64(after)])
				w.(http.Flusher).Flush()
			}
			<-r.Context().Done()
		}
		s.setFault(func(w http.ResponseWriter, r *http.Request, n int) bool {
			if n == 1 {
				stall(w, r)
			}
			return n == 1
		})
		wantRange(t, f, data, 500, 1<<20)
		if got := c.Stats().Retries; got != 1 {
			t.Errorf("stalled after %d bytes: %d retries", after, got)
		}
		s.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool { stall(w, r); return true })
		_, err := readRange(t, f, 500, 100_000)
		if after == 0 {
			wantError(t, "stalls for good", err, ErrStalled, "for 100ms")
		}
		if (err == nil) != (after == 5000) { // then every attempt brings something
			t.Errorf("stalled after %d bytes: %v", after, err)
		}
	}
}

// TestCancel: a reader that waits, for a connection, a reply, a byte or the next attempt, ends with its context.
func TestCancel(t *testing.T) {
	data := random(2 << 20)
	s := newSite(t, data)
	gone := errors.New("gone")
	for _, where := range []string{"reply", "body", "pause"} {
		o := quick()
		o.Pause = time.Hour
		c := newClient(t, o)
		s.setFault(nil)
		f := mustOpen(t, c, s.URL)
		wantRange(t, f, data, 0, firstBytes)
		ctx, cancel := context.WithCancelCause(t.Context())
		s.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool {
			time.AfterFunc(20*time.Millisecond, func() { cancel(gone) })
			from, to := asked(r)
			switch where {
			case "body":
				w.Header().Set("ETag", etag)
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(data)))
				w.WriteHeader(http.StatusPartialContent)
				w.(http.Flusher).Flush()
			case "pause":
				w.WriteHeader(503)
				return true
			}
			<-r.Context().Done()
			return true
		})
		r := f.Range(ctx, 0, 1000)
		if _, err := io.ReadAll(r); !errors.Is(err, gone) {
			t.Errorf("%s: got %v", where, err)
		}
		r.Close()
		cancel(nil)
	}
	// Before anything is sent.
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	c := newClient(t, quick())
	if m, err := c.Open(ctx, s.URL+"/m.gguf"); m != nil || !errors.Is(err, gone) || c.Stats().Requests != 0 {
		t.Errorf("got %v, %+v", err, c.Stats())
	}
}

// TestUnreachable: nobody listens, and no such host.
func TestUnreachable(t *testing.T) {
	s := newSite(t, nil)
	s.Server.Close()
	c := newClient(t, quick())
	_, err := openTestFile(t, c, s.URL+"/m.gguf?secret")
	wantError(t, "refused", err, nil, "connection refused", "(after 4 attempts)")
	if strings.Contains(err.Error(), "secret") {
		t.Error(err)
	}
}

// TestOpenGivesUpEarly: with many attempts for a range there are few for the first.
func TestOpenGivesUpEarly(t *testing.T) {
	s := newSite(t, random(2<<20))
	o := quick()
	o.Attempts = 9
	c := newClient(t, o)
	f := mustOpen(t, c, s.URL)
	wantRange(t, f, s.data, 0, firstBytes)
	s.setFault(func(w http.ResponseWriter, _ *http.Request, _ int) bool { w.WriteHeader(500); return true })
	_, err := openTestFile(t, c, s.URL)
	wantError(t, "first", err, nil, "(after 4 attempts)")
	_, err = readRange(t, f, 0, 100)
	wantError(t, "later", err, nil, "(after 9 attempts)")
}

func TestEmptyFile(t *testing.T) {
	s := newSite(t, nil)
	s.setFault(func(w http.ResponseWriter, _ *http.Request, _ int) bool {
		w.Header().Set("Content-Range", "bytes */0")
		w.WriteHeader(416)
		return true
	})
	c := newClient(t, quick())
	_, err := c.Open(t.Context(), s.URL+"/m.gguf")
	if err == nil || !strings.Contains(err.Error(), "it is empty") {
		t.Errorf("got %v", err)
	}
}
