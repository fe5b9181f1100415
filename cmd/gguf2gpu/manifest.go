package main

import (
	"bufio"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/gguf2gpu/gguf2gpu/loader"
)

// manifest holds hashes by tensor name.
type manifest map[string][loader.HashSize]byte

// unescapeName undoes what escapeName does.
var unescapeName = strings.NewReplacer(append([]string{`\\`, `\`, `\n`, "\n", `\r`, "\r"}, byteEscapes()...)...)

// byteEscapes returns the escapes of all bytes, each before its byte.
func byteEscapes() (all []string) {
	for b := range 256 {
		all = append(all, fmt.Sprintf(`\x%02x`, b), string([]byte{byte(b)}))
	}
	return all
}

// escapeName returns a tensor's name for a line of the list. Names with a backslash or a line break are escaped as
// sha256sum does it: the line begins with a backslash, the mark, then. Other characters that could drive a terminal are
// escaped in the same way, byte by byte, as \x1b.
func escapeName(name string) (mark, escaped string) {
	var b strings.Builder
	for i := 0; i < len(name); {
		r, size := utf8.DecodeRuneInString(name[i:])
		switch {
		case r == '\\':
			b.WriteString(`\\`)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\r':
			b.WriteString(`\r`)
		case strconv.IsPrint(r) && (r != utf8.RuneError || size > 1):
			b.WriteString(name[i : i+size])
		default:
			for _, c := range []byte(name[i : i+size]) {
				fmt.Fprintf(&b, `\x%02x`, c)
			}
		}
		i += size
	}
	if b.String() == name {
		return "", name
	}
	return `\`, b.String()
}

// writeManifest writes a list of hashes: of SHA-256 as sha256sum does, of BLAKE3 as b3sum --tag does, as nothing else
// would tell it from SHA-256.
func writeManifest(w io.Writer, with loader.HashAlgorithm, hashes []loader.TensorHash) error {
	b := bufio.NewWriter(w)
	for _, h := range hashes {
		mark, name := escapeName(h.Name)
		if with == loader.BLAKE3 {
			fmt.Fprintf(b, "%s%s (%s) = %x\n", mark, tagOf(with), name, h.Sum)
		} else {
			fmt.Fprintf(b, "%s%x  %s\n", mark, h.Sum, name)
		}
	}
	return b.Flush()
}

// tagOf is what a list calls an algorithm.
func tagOf(with loader.HashAlgorithm) string { return strings.ToUpper(with.String()) }

// titleOf is what people call it.
func titleOf(with loader.HashAlgorithm) string {
	if with == loader.SHA256 {
		return "SHA-256"
	}
	return tagOf(with)
}

// compare wants every hash in the manifest, and every entry of the manifest in the file, though it need not have been
// loaded.
func (m manifest) compare(with loader.HashAlgorithm, hashes []loader.TensorHash, inFile func(name string) bool) error {
	var first error
	different := 0
	differs := func(format string, args ...any) {
		if different++; first == nil {
			first = fmt.Errorf(format, args...)
		}
	}
	for _, h := range hashes {
		switch want, ok := m[h.Name]; {
		case !ok:
			differs("tensor %q is not listed", h.Name)
		case want != h.Sum:
			differs("tensor %q has %s %x, expected is %x", h.Name, titleOf(with), h.Sum, want)
		}
	}
	missing, example := 0, ""
	for name := range m {
		if !inFile(name) {
			if missing++; example == "" || name < example {
				example = name
			}
		}
	}
	if missing > 0 {
		differs("tensor %q is listed and not there", example)
		different += missing - 1
	}
	if different > 1 {
		return fmt.Errorf("%w (the first of %d differences)", first, different)
	}
	return first
}
