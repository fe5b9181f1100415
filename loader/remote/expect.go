package remote

import (
	"crypto/subtle"
	"fmt"
	"hash"
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

// Comparison compares bytes that come in order, such as those of a stream, with what they have to be.
type Comparison struct {
	path string
	e    Expected
	hash hash.Hash // nil: any
	sum  []byte    // that e says
	size int64
}

// Compare returns what compares the file at path with e. An error says that e has no digest that can be computed.
func (e Expected) Compare(path string) (*Comparison, error) {
	c := &Comparison{path: path, e: e}
	if e.Digest == "" {
		return c, nil
	}
	var err error
	c.hash, c.sum, err = parseDigest(e.Digest)
	return c, err
}

// Write takes the next bytes. It returns no error.
func (c *Comparison) Write(b []byte) (int, error) {
	c.size += int64(len(b))
	if c.hash == nil {
		return len(b), nil
	}
	return c.hash.Write(b)
}

// Result says whether all bytes that came are what they have to be. If not, the error matches ErrDigest.
func (c *Comparison) Result() error {
	if err := c.e.sized(c.path, c.size); err != nil || c.hash == nil {
		return err
	}
	return compareDigest(c.path, c.e.Digest, c.hash.Sum(nil), c.sum)
}

// compareDigest compares the digest that the file at path has with that of the text want, which is sum. If they differ,
// the error matches ErrDigest.
func compareDigest(path, want string, got, sum []byte) error {
	if subtle.ConstantTimeCompare(got, sum) == 1 {
		return nil
	}
	algorithm, _, _ := strings.Cut(want, ":")
	return fmt.Errorf("%w: %s has %s:%x, and should have %s", ErrDigest, path, algorithm, got, want)
}
