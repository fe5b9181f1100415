package remote

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Object is a file on a server, with what is known of it beforehand from a list or a manifest.
type Object struct {
	URL  string // https, or http as for Client.Open
	Size int64  // in bytes; a file of another size is refused; 0: not known
	// Digest is that of the whole file, as OCI writes it: "sha256:" or "sha512:" and hexadecimal digits; or "crc64nvme:",
	// the checksum of S3, which finds errors but no forgeries. "": not known.
	Digest string
	// Check says that the digest is to be checked while the file is read; see Options.Digests.
	Check bool
	// Revision names the version of what the file is part of, such as a commit. It is only kept, for Identity.
	Revision string
	// Send sends requests for the file, to which it may add credentials. It must not follow redirects: the Client does,
	// without Send, so that credentials stay where they belong. It is called for requests to the host and port of URL
	// only, over TLS or to this host. Nil: Options.Tokens and credentials in URL are used.
	Send func(*http.Request) (*http.Response, error)
}

// OpenObjects opens a model whose files are found by name. It calls locate for the file called name and, if that is
// part of a split model, for each of the other parts. For a name that does not exist, the error of locate should match
// [io/fs.ErrNotExist]. It is Client.Open otherwise.
func (c *Client) OpenObjects(
	ctx context.Context, name string, locate func(ctx context.Context, name string) (Object, error),
) (*gguf.File, error) {
	return c.open(ctx, name, func(ctx context.Context, name string) (*address, error) {
		o, err := locate(ctx, name)
		if err != nil {
			return nil, err
		}
		return c.object(&o)
	})
}

// object returns the address of an Object.
func (c *Client) object(o *Object) (*address, error) {
	a, err := c.parse(o.URL)
	if err != nil {
		return nil, err
	}
	if o.Digest != "" {
		if _, _, err := parseDigest(o.Digest); err != nil {
			return nil, fmt.Errorf("%w %s: %w", ErrAddress, redact(&a.url), err)
		}
	}
	a.size, a.digest, a.check, a.revision = o.Size, o.Digest, o.Check, o.Revision
	if a.url.Scheme == "https" || loopback(&a.url) {
		a.send = o.Send
	}
	return a, nil
}

// open opens the model of which locate knows the files.
func (c *Client) open(
	ctx context.Context, name string, locate func(ctx context.Context, name string) (*address, error),
) (*gguf.File, error) {
	fails := new(failure)
	return gguf.OpenSource(ctx, name, func(ctx context.Context, name string) (gguf.Source, error) {
		a, err := locate(ctx, name)
		if err != nil {
			return nil, err
		}
		if err := c.expect(a, name); err != nil {
			return nil, err
		}
		return c.source(ctx, a, fails)
	})
}

// source opens the file at an address, or what the cache has of it.
func (c *Client) source(ctx context.Context, a *address, fails *failure) (gguf.Source, error) {
	if s, err := c.cached(a, nil, fails); s != nil || err != nil {
		return s, err
	}
	f, err := c.openFile(ctx, a)
	if err != nil {
		return nil, err
	}
	id := f.Identity()
	if err := a.expected.sized(id.URL, id.Size); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if s, err := c.cached(a, &id, fails); s != nil || err != nil {
		return s, errors.Join(err, f.Close())
	}
	s := newChecked(f, c.wanted(a), fails)
	s.always = c.always(a)
	if err := c.keep(s, a, &id); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if s.digest == nil && s.keeper == nil {
		return f, nil
	}
	return s, nil
}

// always reports whether a file is compared with its digest also if a share of the model is loaded.
func (c *Client) always(a *address) bool {
	return c.o.Digests == DigestsAlways || a.expected.Digest != ""
}

// wanted is the digest that a file is to be compared with; "" for none.
func (c *Client) wanted(a *address) string {
	if a.expected.Digest != "" {
		return a.digest
	}
	if c.o.Digests == DigestsNever || c.o.Digests == DigestsAuto && !a.check {
		return ""
	}
	return a.digest
}

// OpenLocal opens the file at path, and the other parts beside it if it is part of a split model. digest returns the
// digest of the file called name, or "". The files are compared with it while they are read, if Options.Digests is
// DigestsAlways, and with what Options.Expect says. Without either OpenLocal is [gguf.Open].
func (c *Client) OpenLocal(ctx context.Context, path string, digest func(name string) string) (*gguf.File, error) {
	if c.o.Digests != DigestsAlways && c.o.Expect == nil {
		return gguf.Open(path)
	}
	fails := new(failure)
	return openDisk(ctx, path, func(d *disk, name string) (gguf.Source, error) {
		expected, err := c.expected(name)
		if err == nil {
			err = expected.sized(d.path, d.Size())
		}
		if err != nil {
			return nil, err
		}
		want := expected.Digest
		if want == "" && c.o.Digests == DigestsAlways {
			want = digest(name)
		}
		if want == "" {
			return d, nil
		}
		if _, _, err := parseDigest(want); err != nil {
			return nil, err
		}
		s := newChecked(d, want, fails)
		s.always = true
		return s, nil
	})
}
