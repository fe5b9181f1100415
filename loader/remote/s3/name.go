package s3

import (
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// Name names an object, or all objects whose keys begin alike.
type Name struct {
	Google  bool // gs://, not s3://
	Bucket  string
	Key     string // without a leading slash; "" or with a slash at its end: a directory
	Version string // of the object; "": the latest
}

var bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]$`)

// IsName reports whether s is meant to be a name of this package: whether it begins with s3:// or gs://.
func IsName(s string) bool { return strings.HasPrefix(s, "s3://") || strings.HasPrefix(s, "gs://") }

// Parse reads a name: s3://BUCKET/KEY or gs://BUCKET/KEY. The key is taken as it is, without escapes; ?versionId=ID may
// follow. Its errors match [remote.ErrAddress].
func Parse(s string) (n Name, err error) {
	refuse := func(why string) (Name, error) {
		return Name{}, fmt.Errorf("%w %.300q: %s; use s3://BUCKET/KEY", remote.ErrAddress, s, why)
	}
	scheme, rest, ok := strings.Cut(s, "://")
	if !ok || !IsName(s) {
		return refuse("it does not begin with s3:// or gs://")
	}
	n.Google = scheme == "gs"
	n.Bucket, n.Key, _ = strings.Cut(rest, "/")
	if i := strings.LastIndex(n.Key, "?versionId="); i >= 0 {
		n.Key, n.Version = n.Key[:i], n.Key[i+len("?versionId="):]
		if n.Version == "" {
			return refuse("it names no version")
		}
	}
	switch {
	case !bucketName.MatchString(n.Bucket) || strings.Contains(n.Bucket, ".."):
		return refuse("that is no name of a bucket")
	case len(n.Key) > 1024:
		return refuse("a key has at most 1024 bytes")
	case strings.ContainsFunc(n.Key+n.Version, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return refuse("it holds control characters")
	case strings.HasPrefix(n.Key, "/"), strings.Contains("/"+n.Key+"/", "/./"), strings.Contains("/"+n.Key+"/", "/../"):
		return refuse("servers on the way do not leave such a key as it is")
	}
	return n, nil
}

// String returns the name in the form that Parse reads.
func (n Name) String() string {
	s := "s3://"
	if n.Google {
		s = "gs://"
	}
	if s += n.Bucket + "/" + n.Key; n.Version != "" {
		s += "?versionId=" + n.Version
	}
	return s
}

// IsDirectory reports whether it names what begins alike, and not one object.
func (n Name) IsDirectory() bool { return n.Key == "" || strings.HasSuffix(n.Key, "/") }

// beside is the key of the object called name in the same directory.
func (n Name) beside(name string) string {
	if dir := path.Dir(n.Key); dir != "." {
		return dir + "/" + name
	}
	return name
}

// escape escapes a key as signatures want it: all but letters, digits, "-._~" and slashes.
func escape(key string) string {
	var b strings.Builder
	for i := range len(key) {
		switch c := key[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("-._~/", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// query returns a query with its values escaped as signatures want it.
func query(pairs ...string) string {
	var all []string
	for i := 0; i < len(pairs); i += 2 {
		all = append(all, url.QueryEscape(pairs[i])+"="+strings.ReplaceAll(escape(pairs[i+1]), "/", "%2F"))
	}
	return strings.Join(all, "&")
}
