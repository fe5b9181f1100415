package s3

import (
	"cmp"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"strconv"
	"strings"
	"sync"

	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// Store opens models of a store. It is safe for concurrent use.
type Store struct {
	client   *remote.Client
	o        Options
	endpoint *url.URL // nil: AWS
	region   string
	signer   *v4.Signer

	mu      sync.Mutex
	buckets map[string]*bucket
}

// New returns a Store that reads by means of c, which must not be closed before what was opened. The error matches
// [remote.ErrAddress] if the endpoint cannot be one.
func New(c *remote.Client, o Options) (*Store, error) {
	s := &Store{
		client: c, o: o, region: cmp.Or(o.Region, defaultRegion), buckets: map[string]*bucket{},
		signer: v4.NewSigner(func(so *v4.SignerOptions) { so.DisableURIPathEscaping = true }), // keys are escaped once
	}
	if !regionName.MatchString(s.region) {
		return nil, fmt.Errorf("%w: %.100q is no region", remote.ErrAddress, s.region)
	}
	if o.Endpoint == "" {
		return s, nil
	}
	u, err := url.Parse(strings.TrimRight(o.Endpoint, "/"))
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Scheme != "https" && u.Scheme != "http" {
		return nil, fmt.Errorf("%w %s: the endpoint of a store is https://HOST", remote.ErrAddress, remote.Redact(o.Endpoint))
	}
	s.endpoint = u
	return s, nil
}

// isAWS reports whether the store is AWS's own.
func (s *Store) isAWS() bool { return s.endpoint == nil }

// awsHost is the host of a region of AWS.
func awsHost(region string) string {
	if strings.HasPrefix(region, "cn-") {
		return "s3." + region + ".amazonaws.com.cn"
	}
	return "s3." + region + ".amazonaws.com"
}

// bucket returns what sends the requests for a bucket.
func (s *Store) bucket(name string) *bucket {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.buckets[name]
	if b == nil {
		b = &bucket{store: s, name: name, region: s.region}
		s.buckets[name] = b
	}
	return b
}

// address is that of an object of a bucket, or of the bucket itself for "".
func (s *Store) address(bucket, key string) string {
	scheme, host, base := "https", awsHost(s.region), ""
	virtual := true
	if s.endpoint != nil {
		scheme, host, base, virtual = s.endpoint.Scheme, s.endpoint.Host, s.endpoint.EscapedPath(), s.o.VirtualHosts
	}
	if virtual && !strings.ContainsAny(bucket, "._") { // no certificate is for more than one name before the host
		return scheme + "://" + bucket + "." + host + base + "/" + escape(key)
	}
	return scheme + "://" + host + base + "/" + bucket + "/" + escape(key)
}

// sender returns what sends requests for a bucket; nil if nothing is to be added to them.
func (s *Store) sender(b *bucket) func(*http.Request) (*http.Response, error) {
	if s.o.Credentials == nil && s.o.Token == "" && !s.o.RequesterPays && s.o.Project == "" && !s.isAWS() {
		return nil
	}
	return b.send
}

// Open opens the model that n names, with all its parts if it is split. The caller must Close the file.
func (s *Store) Open(ctx context.Context, n Name) (*gguf.File, error) {
	if n.IsDirectory() {
		return nil, fmt.Errorf("%w %s: it names a directory, not an object", remote.ErrAddress, n)
	}
	b := s.bucket(n.Bucket)
	f, err := s.client.OpenObjects(ctx, path.Base(n.Key), func(ctx context.Context, name string) (remote.Object, error) {
		o := remote.Object{URL: s.address(n.Bucket, n.beside(name)), Send: s.sender(b)}
		if n.Version != "" && name == path.Base(n.Key) {
			o.URL += "?" + query("versionId", n.Version)
			o.Revision = n.Version
		}
		if s.client.Digests() == remote.DigestsAlways {
			o.Digest = s.checksum(ctx, o)
		}
		return o, nil
	})
	if err != nil {
		return nil, s.explain(n, b, err)
	}
	return f, nil
}

// explain adds the name, and why there are no credentials, to an error.
func (s *Store) explain(n Name, b *bucket, err error) error {
	if _, ok := errors.AsType[*gguf.FormatError](err); ok {
		return err
	}
	none := b.whyNone()
	switch {
	case !errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w", n, err)
	case none != nil:
		return fmt.Errorf("%s: %w; there are no credentials: %w", n, err, none)
	case s.o.Credentials == nil && s.o.Token == "":
		return fmt.Errorf("%s: %w; there are no credentials", n, err)
	}
	return fmt.Errorf("%s: %w", n, err)
}

// listed is a page of a list of objects.
type listed struct {
	XMLName   xml.Name `xml:"ListBucketResult"`
	Truncated bool     `xml:"IsTruncated"`
	Next      string   `xml:"NextContinuationToken"`
	Contents  []struct {
		Key  string
		Size int64
	}
}

const (
	// maxPages bounds the pages of a list; each has up to 1000 objects.
	maxPages = 100
	// maxPage is the greatest page, in bytes: 1000 keys of 1 KiB, with escapes.
	maxPage = 16 << 20
)

// splitName matches the names of the parts of a split model.
var splitName = regexp.MustCompile(`^(.*)-([0-9]{5})-of-([0-9]{5})\.gguf$`)

// List says which models there are whose keys begin with that of n.
func (s *Store) List(ctx context.Context, n Name) (*remote.Listing, error) {
	b := s.bucket(n.Bucket)
	l := &remote.Listing{Name: n.String()}
	splits := map[string]int{} // by what the names begin with
	token := ""
	for range maxPages {
		q := []string{"list-type", "2", "prefix", n.Key}
		if token != "" {
			q = append([]string{"continuation-token", token}, q...)
		}
		text, _, err := s.client.Get(ctx, remote.Document{
			URL: s.address(n.Bucket, "") + "?" + query(q...), Accept: "application/xml", Limit: maxPage, Send: s.sender(b),
		})
		if err != nil {
			return nil, s.explain(n, b, err)
		}
		var page listed
		if err := xml.Unmarshal(text, &page); err != nil {
			return nil, fmt.Errorf("%s: %w: the list cannot be read: %w", n, remote.ErrReply, err)
		}
		for _, c := range page.Contents {
			if !strings.HasSuffix(strings.ToLower(c.Key), ".gguf") {
				continue
			}
			e := remote.Entry{
				Name: Name{Google: n.Google, Bucket: n.Bucket, Key: c.Key}.String(), File: c.Key, Quant: remote.Quant(c.Key),
				Files: 1,
				Bytes: c.Size,
			}
			if part := splitName.FindStringSubmatch(c.Key); part != nil {
				key := part[1] + part[3]
				if i, ok := splits[key]; ok {
					l.Entries[i].Bytes += c.Size
					continue
				}
				splits[key] = len(l.Entries)
				e.Files, _ = strconv.Atoi(part[3])
			}
			l.Entries = append(l.Entries, e)
		}
		if token = page.Next; !page.Truncated || token == "" {
			return l, nil
		}
	}
	return nil, fmt.Errorf("%s: more than %d objects: name a longer beginning", n, maxPages*1000)
}
