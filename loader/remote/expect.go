package remote

import (
	"fmt"
	"path"
	"strings"
)

// Expected is what a file has to be.
type Expected struct {
	Digest string // of the whole file, in the form of Object.Digest; "": any
	Size   int64  // in bytes; 0: any
}

// expected says what the file called name has to be.
func (c *Client) expected(name string) (e Expected, err error) {
	if c.o.Expect == nil {
		return e, nil
	}
	if e, err = c.o.Expect(path.Base(name)); err != nil || e.Digest == "" {
		return e, err
	}
	_, _, err = parseDigest(e.Digest)
	return e, err
}

// expect adds to a what the file called name has to be.
func (c *Client) expect(a *address, name string) error {
	e, err := c.expected(name)
	if err != nil {
		return err
	}
	a.expected = e
	if e.Digest == "" {
		return nil
	}
	if sameAlgorithm(a.digest, e.Digest) && a.digest != e.Digest {
		return fmt.Errorf("%w: %s has %s, says where it is from, and should have %s",
			ErrDigest, redact(&a.url), a.digest, e.Digest)
	}
	a.digest = e.Digest
	return nil
}

// sameAlgorithm reports whether both are digests of one algorithm.
func sameAlgorithm(a, b string) bool {
	of, _, known := strings.Cut(a, ":")
	return known && strings.HasPrefix(b, of+":")
}

// sized returns an error if the file at path has another size than it should have.
func (e Expected) sized(path string, size int64) error {
	if e.Size == 0 || size == e.Size {
		return nil
	}
	return fmt.Errorf("%w: %s has %d bytes, and should have %d", ErrDigest, path, size, e.Size)
}
