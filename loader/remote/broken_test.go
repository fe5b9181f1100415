package remote

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestBrokenConnections: a range goes on from the byte that was reached, however its connections end.
func TestBrokenConnections(t *testing.T) {
	t.Parallel()
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
			hijack(w, fmt.Sprintf("HTTP/1.1 206 Partial Content|ETag: %s|Content-Length: %d|"+
				"Content-Range: bytes %d-%d/%d|Last-Modified: x",
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
	t.Parallel()
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

// TestUnreachable: nobody listens, and no such host.
func TestUnreachable(t *testing.T) {
	t.Parallel()
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
	t.Parallel()
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
