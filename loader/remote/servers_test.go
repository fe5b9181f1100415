package remote

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
)

// changing serves a file, with headers that change alters for the nth reply, from 1 on.
func changing(s *site, change func(h http.Header, n int)) func(w http.ResponseWriter, r *http.Request, n int) bool {
	return func(w http.ResponseWriter, r *http.Request, n int) bool {
		rec := httptest.NewRecorder()
		s.serve(rec, r)
		maps.Copy(w.Header(), rec.Header())
		change(w.Header(), n)
		w.WriteHeader(rec.Code)
		w.Write(rec.Body.Bytes())
		return true
	}
}

// TestHeaders: what servers say differently although they mean the same is accepted.
func TestHeaders(t *testing.T) {
	t.Parallel()
	s := newSite(t, random(2<<20))
	set := func(key string, values ...string) func(h http.Header, n int) {
		return func(h http.Header, n int) { h[key] = []string{values[n%len(values)]} }
	}
	for _, tt := range []struct {
		name   string
		change func(h http.Header, n int)
		is     error // nil: accepted
	}{
		{"aws-chunked", set("Content-Encoding", "aws-chunked"), nil},
		{"aws-chunked, in capitals", set("Content-Encoding", "AWS-Chunked, identity"), nil},
		{"a character set", set("Content-Encoding", "UTF-8"), nil},
		{"no encoding", set("Content-Encoding", "", "none"), nil},
		{"gzip", set("Content-Encoding", "gzip"), ErrReply},
		{"gzip, sent as aws-chunked", set("Content-Encoding", "gzip,aws-chunked"), ErrReply},
		{
			"gzip in a second header", func(h http.Header, _ int) { h["Content-Encoding"] = []string{"aws-chunked", "gzip"} },
			ErrReply,
		},
		{"a new encoding", set("Content-Encoding", "x-new"), ErrReply},
		{"now weak, now strong", set("Etag", `W/"v1"`, `"v1"`), nil},
		{"another weak ETag", set("Etag", `W/"v1"`, `W/"v2"`), ErrChanged},
		{"a unit in capitals", func(h http.Header, _ int) {
			h.Set("Content-Range", strings.Replace(h.Get("Content-Range"), "bytes", "Bytes", 1))
		}, nil},
		{"two spaces", func(h http.Header, _ int) {
			h.Set("Content-Range", strings.Replace(h.Get("Content-Range"), " ", "  ", 1))
		}, nil},
		{"= as in a request", func(h http.Header, _ int) {
			h.Set("Content-Range", strings.Replace(h.Get("Content-Range"), " ", "=", 1))
		}, nil},
		{"another unit", func(h http.Header, _ int) {
			h.Set("Content-Range", strings.Replace(h.Get("Content-Range"), "bytes", "items", 1))
		}, ErrReply},
	} {
		s.setFault(changing(s, tt.change))
		f, err := openTestFile(t, newClient(t, quick()), s.URL)
		var got []byte
		if err == nil {
			got, err = readRange(t, f, 0, f.Size())
		}
		if !errors.Is(err, tt.is) || err == nil && !bytes.Equal(got, s.data) {
			t.Errorf("%s: got %d bytes, %v; want %v", tt.name, len(got), err, tt.is)
		}
	}
}

// TestShortReplies: a server may send fewer bytes than were asked for. Reading goes on with the next request, without a
// pause.
func TestShortReplies(t *testing.T) {
	t.Parallel()
	data := random(3<<20 + 17)
	for _, most := range []int64{64 << 10, 1 << 20} {
		s := newSite(t, data)
		s.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool {
			from, to := asked(r)
			r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, min(to, from+most)-1))
			return false
		})
		c := newClient(t, quick())
		f := mustOpen(t, c, s.URL)
		wantRange(t, f, data, 0, firstBytes)
		wantRange(t, f, data, 1000, 2_000_000)
		wantRange(t, f, data, 0, int64(len(data)))
		want := firstBytes/most + (2_000_000+most-1)/most + (int64(len(data))+most-1)/most
		if st := c.Stats(); st.Retries != 0 || st.Requests != want {
			t.Errorf("at most %d bytes: %+v, want %d requests", most, st, want)
		}
	}
}

// TestShortRepliesAreChecked: a reply that is short, but not from the right start on, is no part of what was asked for.
func TestShortRepliesAreChecked(t *testing.T) {
	t.Parallel()
	s := newSite(t, random(2<<20))
	f := mustOpen(t, newClient(t, quick()), s.URL)
	for _, span := range [][2]int64{{101, 200}, {99, 200}, {0, 50}, {1000, 1001}} {
		s.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool {
			r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", span[0], span[1]-1))
			return false
		})
		_, err := readRange(t, f, 100, 1000)
		wantError(t, fmt.Sprint(span), err, ErrReply, "it has bytes")
	}
	s.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool { // the length is not that of the range
		from, _ := asked(r)
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, from+9, len(s.data)))
		w.Header().Set("Content-Length", "11")
		w.Header().Set("ETag", etag)
		w.WriteHeader(http.StatusPartialContent)
		return true
	})
	_, err := readRange(t, f, 100, 1000)
	wantError(t, "a longer body", err, ErrReply, "its body has 11 bytes")
}

// TestEdges: a later redirect may lead to another server, whose ETag is another one. Then the file is the same if what
// the servers say of its content is the same.
func TestEdges(t *testing.T) {
	t.Parallel()
	data := random(2 << 20)
	header := func(key string, edges ...string) func(h http.Header, edge int) {
		return func(h http.Header, edge int) { h.Set(key, edges[edge]) }
	}
	none := func(http.Header, int) {}
	for _, tt := range []struct {
		name        string
		hop, answer func(h http.Header, edge int) // alter the redirect to an edge, 0 or 1, and its replies
		size        int                           // of the file on the second edge
		want        string                        // of the error; "": the file is the same
	}{
		{"size alone", none, none, 2 << 20, ""},
		{"another size", none, none, 2<<20 - 1, "2097151 bytes"},
		{"X-Linked-ETag", header("X-Linked-ETag", `"sha"`, `W/"sha"`), none, 2 << 20, ""},
		{"another X-Linked-ETag", header("X-Linked-ETag", `"sha"`, `"other"`), none, 2 << 20, "X-Linked-ETag"},
		{"digest", none, header("Repr-Digest", "sha-256=:x:", "sha-256=:x:"), 2 << 20, ""},
		{"another digest", none, header("Repr-Digest", "sha-256=:x:", "sha-256=:y:"), 2 << 20, "Repr-Digest"},
		{"digests in another order", none, header("X-Goog-Hash", "crc32c=a, md5=b", "md5=b,crc32c=a"), 2 << 20, ""},
		{"another old digest", none, header("Digest", "md5=x", "md5=y"), 2 << 20, "Digest"},
	} {
		var edges [2]*site
		for i := range edges {
			edges[i] = newSite(t, data)
			tag := fmt.Sprintf(`"edge-%d"`, i)
			edges[i].setFault(changing(edges[i], func(h http.Header, _ int) { h.Set("ETag", tag); tt.answer(h, i) }))
		}
		edges[1].data = data[:tt.size]
		way := newSite(t, nil)
		edge := 0
		way.setFault(func(w http.ResponseWriter, r *http.Request, _ int) bool {
			tt.hop(w.Header(), edge)
			http.Redirect(w, r, edges[edge].URL+"/blob?signature="+strconv.Itoa(edge), http.StatusFound)
			return true
		})
		f := mustOpen(t, newClient(t, quick()), way.URL+"/m.gguf")
		wantRange(t, f, data, 0, firstBytes)
		// The address of the first edge expires.
		edges[0].setFault(func(w http.ResponseWriter, _ *http.Request, _ int) bool { w.WriteHeader(403); return true })
		edge = 1
		got, err := readRange(t, f, 1<<20, 1000)
		if tt.want != "" {
			wantError(t, tt.name, err, ErrChanged, tt.want)
			continue
		}
		if err != nil || !bytes.Equal(got, data[1<<20:][:1000]) {
			t.Errorf("%s: got %d bytes, %v", tt.name, len(got), err)
		}
		// From now on the second edge's ETag must stay what it is.
		edges[1].setFault(changing(edges[1], func(h http.Header, _ int) { h.Set("ETag", `"new"`); tt.answer(h, 1) }))
		_, err = readRange(t, f, 1<<20, 1000)
		wantError(t, tt.name+", then changed", err, ErrChanged, "ETag")
	}
}

// TestPages: a web page in place of a file is called one, and for pages about files the address of the file is
// suggested.
func TestPages(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	s.setFault(func(w http.ResponseWriter, _ *http.Request, _ int) bool {
		w.Header().Set("Content-Type", "text/HTML; charset=utf-8")
		io.WriteString(w, "<!doctype html><html></html>")
		return true
	})
	for path, want := range map[string]string{
		"/org/repo/blob/main/m.gguf?download=true": s.URL + "/org/repo/resolve/main/m.gguf",
		"/m.gguf?secret": "a token",
	} {
		_, err := newClient(t, quick()).Open(t.Context(), s.URL+path)
		wantError(t, path, err, ErrPage, "a web page", want)
		if strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "download") || len(s.requests()) > 2 {
			t.Errorf("%s: %v after %d requests", path, err, len(s.requests()))
		}
	}
	for _, tt := range [][2]string{
		{"https://huggingface.co/o/r/blob/main/a%20b.gguf", "https://huggingface.co/o/r/resolve/main/a%20b.gguf"},
		{"https://github.com/o/r/blob/main/m.gguf?raw=x#y", "https://github.com/o/r/raw/main/m.gguf"},
		{"https://h/blob/m.gguf", "https://h/resolve/m.gguf"},
		{"https://h/m.gguf", ""},
	} {
		a, err := newClient(t, Options{}).parse(tt[0])
		if err != nil {
			t.Fatal(err)
		}
		if got := pageFile(&a.url); got != tt[1] {
			t.Errorf("for the page %s the file %q is suggested, want %q", tt[0], got, tt[1])
		}
	}
}
