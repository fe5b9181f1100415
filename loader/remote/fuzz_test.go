package remote

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// FuzzReply holds replies that may be anything to what they are held to: accepted is only the very range that was asked
// for, of a file that is what it was.
func FuzzReply(f *testing.F) {
	f.Add(206, "bytes 10-19/100", "10", `"a"`, "", int64(10), int64(20))
	f.Add(206, "bytes 0-99/100", "", `"a"`, "identity", int64(0), int64(1<<20))
	f.Add(206, "bytes 0-9/*", "10", "", "gzip", int64(0), int64(10))
	f.Add(416, "bytes */0", "0", "", "", int64(0), int64(10))
	f.Add(206, "bytes 18446744073709551615-9223372036854775808/4611686018427387904", "-1", "", "", int64(0), int64(10))
	f.Add(503, "", "", "Retry-After", "", int64(0), int64(10))
	client := NewClient(Options{})
	f.Fuzz(func(t *testing.T, code int, contentRange, length, tag, encoding string, off, end int64) {
		if off < 0 || end <= off || end > 1<<40 {
			return
		}
		resp := &http.Response{StatusCode: code, Header: http.Header{}, ContentLength: -1}
		for k, v := range map[string]string{
			"Content-Range": contentRange, "ETag": tag, "Content-Encoding": encoding,
			"Retry-After": length,
		} {
			if v != "" {
				resp.Header.Set(k, v)
			}
		}
		if length != "" {
			resp.ContentLength = int64(len(contentRange))
		}
		here := &place{url: &url.URL{Scheme: "https", Host: "h", Path: "/m"}}
		fresh := &file{c: client, a: &address{}}
		if to, err := fresh.check(resp, here, off, end); err == nil {
			if fresh.id == nil || fresh.id.size < 0 || code == 206 && (fresh.id.size <= off || to <= off || to > end ||
				!strings.HasPrefix(strings.ToLower(strings.TrimSpace(contentRange)), "bytes")) {
				t.Errorf("a file of %+v", fresh.id)
			}
		}
		known := &file{c: client, a: &address{}, id: &identity{
			size: 1 << 40, digests: map[string]string{},
			seen: map[string]validator{
				"https://h/m": {etag: `"a"`},
			},
		}}
		if reached, err := known.check(resp, here, off, end); err == nil {
			from, to, size, err := parseRange(resp.Header.Values("Content-Range"))
			if err != nil || code != 206 || from != off || to > end || to != reached || size != 1<<40 ||
				strongTag(tag) != `"a"` {
				t.Errorf("accepted: %d %q %q", code, contentRange, tag)
			}
		} else if err.Error() == "" {
			t.Error("an error without a text")
		}
		if known.id.size != 1<<40 {
			t.Error("the file has become another one")
		}
	})
}
