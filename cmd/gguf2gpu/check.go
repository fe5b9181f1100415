package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/loader"
)

// hashFlags are --hash and --expect. A nil *hashFlags is that of a command that has neither.
type hashFlags struct {
	cmd      *cobra.Command
	to, from *string
	json     *bool
	shard    *shardFlags
	expected manifest // after prepare, with --expect
}

func addHashFlags(cmd *cobra.Command, json *bool) *hashFlags {
	fs := cmd.Flags()
	return &hashFlags{
		cmd: cmd, json: json,
		to:   fs.String("hash", "", "write the SHA-256 of each tensor's bytes in MODEL (of a slice, of its own) to this file, as sha256sum does (-: stdout)"),
		from: fs.String("expect", "", "compare each tensor's SHA-256 with this file, made by --hash; exit status 6 if one differs"),
	}
}

// wanted reports whether the loader has to hash.
func (h *hashFlags) wanted() bool { return h != nil && (*h.to != "" || *h.from != "") }

// ownsStdout reports whether stdout is for the hashes alone.
func (h *hashFlags) ownsStdout() bool { return h != nil && *h.to == "-" }

// outputs returns what finish writes.
func (h *hashFlags) outputs() []plannedOutput {
	if h == nil {
		return nil
	}
	return []plannedOutput{{"--hash", h.shard.expand(*h.to)}}
}

// prepare finds out before the load what would be in the way after it.
func (h *hashFlags) prepare() error {
	if h == nil {
		return nil
	}
	if h.ownsStdout() && *h.json {
		return usageErrorf("--hash - and --json both want stdout; write the hashes to a file")
	}
	if *h.from == "" {
		return nil
	}
	f, err := os.Open(h.shard.expand(*h.from))
	if err != nil {
		return err
	}
	defer f.Close()
	if h.expected, err = readManifest(f); err != nil {
		return fmt.Errorf("%s: %w", *h.from, err)
	}
	return nil
}

// finish writes and compares the hashes of what has been loaded.
func (h *hashFlags) finish(s *loaded) error {
	if !h.wanted() {
		return nil
	}
	hashes := s.weights.Hashes()
	var err error
	switch *h.to {
	case "":
	case "-":
		err = writeManifest(h.cmd.OutOrStdout(), hashes)
	default:
		err = writeFile(h.shard.expand(*h.to), func(o *outputFile) error { return writeManifest(o, hashes) })
	}
	if err != nil || h.expected == nil {
		return err
	}
	inFile := func(name string) bool { _, ok := s.file.Tensor(name); return ok }
	if err := h.expected.compare(hashes, inFile); err != nil {
		return withCode(exitMismatch, fmt.Errorf("%s is not what %s says: %w", s.path, *h.from, err))
	}
	s.asExpected = true
	return nil
}

// manifest holds SHA-256 sums by tensor name.
type manifest map[string][sha256.Size]byte

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

func writeManifest(w io.Writer, hashes []loader.TensorHash) error {
	b := bufio.NewWriter(w)
	for _, h := range hashes {
		mark, name := escapeName(h.Name)
		fmt.Fprintf(b, "%s%x  %s\n", mark, h.Sum, name)
	}
	return b.Flush()
}

func readManifest(r io.Reader) (manifest, error) {
	m := make(manifest)
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		line, escaped := strings.CutPrefix(lines.Text(), `\`)
		digits, name, ok := strings.Cut(line, "  ")
		sum, err := hex.DecodeString(digits)
		if !ok || err != nil || len(sum) != sha256.Size {
			return nil, fmt.Errorf("line %d is not of the form SHA256, two spaces, tensor name", n)
		}
		if escaped {
			name = unescapeName.Replace(name)
		}
		if _, twice := m[name]; twice {
			return nil, fmt.Errorf("line %d: tensor %q occurs twice", n, name)
		}
		m[name] = [sha256.Size]byte(sum)
	}
	return m, lines.Err()
}

// compare wants every hash in the manifest, and every entry of the manifest in the file, though it need not have been
// loaded.
func (m manifest) compare(hashes []loader.TensorHash, inFile func(name string) bool) error {
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
			differs("tensor %q has SHA-256 %x, expected is %x", h.Name, h.Sum, want)
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
