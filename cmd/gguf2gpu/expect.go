package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"

	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// expectation is what --expect says: either what the tensors of a model are, or what its files are.
type expectation struct {
	with    loader.HashAlgorithm
	tensors manifest // nil: it is about files
	files   *expectedFiles
}

// what says for people what was compared.
func (e *expectation) what() string {
	if e.tensors != nil {
		return "every tensor has its " + titleOf(e.with)
	}
	return "every file has its digest"
}

// maxExpectation bounds the size of the file of --expect: lists of more tensors than there are in any model.
const maxExpectation = 64 << 20

// readExpectation reads what --expect names: a digest itself, or a file. model is the name of the model.
func readExpectation(from, model string) (*expectation, error) {
	f, err := os.Open(from)
	if err != nil {
		if digest, ok := digestOf(from); ok && errors.Is(err, fs.ErrNotExist) {
			return &expectation{files: &expectedFiles{from: from, one: remote.Expected{Digest: digest}}}, nil
		}
		if why := wrongDigest(from); why != "" && errors.Is(err, fs.ErrNotExist) {
			return nil, usageErrorf("--expect %q: %s", from, why)
		}
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxExpectation))
	if err == nil {
		var e *expectation
		if e, err = parseExpectation(from, model, text); err == nil {
			return e, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", from, err)
}

// digestOf returns the digest that s is: sha256: or sha512: and digits, or 64 or 128 digits alone.
func digestOf(s string) (string, bool) {
	algorithm, digits, named := strings.Cut(s, ":")
	if !named {
		algorithm, digits = "", s
	}
	sum, err := hex.DecodeString(digits)
	algorithm = strings.ToLower(algorithm)
	switch {
	case err != nil:
	case len(sum) == sha256.Size && (!named || algorithm == "sha256"):
		return fmt.Sprintf("sha256:%x", sum), true
	case len(sum) == sha512.Size && (!named || algorithm == "sha512"):
		return fmt.Sprintf("sha512:%x", sum), true
	}
	return "", false
}

// wrongDigest says what is wrong with s if it was meant as a digest; else "".
func wrongDigest(s string) string {
	algorithm, digits, named := strings.Cut(s, ":")
	lengths := map[string]int{"sha256": sha256.Size, "sha512": sha512.Size}
	switch size := lengths[strings.ToLower(algorithm)]; {
	case size > 0 && named:
		return fmt.Sprintf("%d hexadecimal digits are wanted, and there are %d characters", 2*size, len(digits))
	case named && otherAlgorithm(s) != "":
		return algorithm + " is not offered, only sha256 and sha512"
	case !named && len(s) >= 32 && strings.Trim(strings.ToLower(s), "0123456789abcdef") == "":
		return fmt.Sprintf("there is no such file, and a digest has 64 or 128 hexadecimal digits, not %d", len(s))
	}
	return ""
}

// parseExpectation reads the text of a file: a pointer of Git LFS, or a list.
func parseExpectation(from, model string, text []byte) (*expectation, error) {
	if bytes.HasPrefix(text, []byte("version https://git-lfs.github.com/spec/")) {
		one, err := parsePointer(text)
		return &expectation{files: &expectedFiles{from: from, one: one}}, err
	}
	list, err := readList(bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	if len(list) == 1 && list[0].nameless {
		digest, ok := digestOf(hex.EncodeToString(list[0].sum))
		if !ok || list[0].tag != "" {
			return nil, errors.New("line 1 has no digest of a file")
		}
		return &expectation{files: &expectedFiles{from: from, one: remote.Expected{Digest: digest}}}, nil
	}
	if list.isOfFiles(model) {
		named, err := list.files()
		return &expectation{files: &expectedFiles{from: from, named: named}}, err
	}
	e := new(expectation)
	e.with, e.tensors, err = list.tensors()
	return e, err
}

// parsePointer reads what Git LFS has in the place of a large file.
func parsePointer(text []byte) (e remote.Expected, err error) {
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimRight(line, "\r\n"), " ")
		switch key {
		case "oid":
			var ok bool
			if e.Digest, ok = digestOf(value); !ok {
				return e, fmt.Errorf("the pointer's oid %.100q is no digest", value)
			}
		case "size":
			if e.Size, err = strconv.ParseInt(value, 10, 64); err != nil || e.Size <= 0 {
				return e, fmt.Errorf("the pointer's size is %.100q", value)
			}
		}
	}
	if e.Digest == "" || e.Size == 0 {
		return e, errors.New("it is a pointer of Git LFS without oid or size")
	}
	return e, nil
}

// sumLine is a line of a list.
type sumLine struct {
	line     int
	tag      string // in upper case, such as BLAKE3; "": none
	sum      []byte
	name     string
	nameless bool // it is a sum alone
}

// sumList is a list as sha256sum and other tools write it.
type sumList []sumLine

// tagged is a line with a tag: BLAKE3 (name) = digits.
var tagged = regexp.MustCompile(`^([A-Za-z0-9-]+) \((.*)\) = ([0-9a-fA-F]+)$`)

// readList reads a list. Empty lines and those that begin with # say nothing.
func readList(r io.Reader) (list sumList, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSuffix(lines.Text(), "\r")
		if text == "" || text[0] == '#' {
			continue
		}
		text, escaped := strings.CutPrefix(text, `\`)
		x := sumLine{line: n}
		digits, name, ok := strings.Cut(text, " ")
		if m := tagged.FindStringSubmatch(text); m != nil {
			x.tag, x.name, digits = strings.ReplaceAll(strings.ToUpper(m[1]), "-", ""), m[2], m[3]
		} else if x.nameless = !ok; ok {
			if name == "" || name[0] != ' ' && name[0] != '*' { // text or binary, for sha256sum
				return nil, errListLine(n)
			}
			x.name = name[1:]
		}
		if x.sum, err = hex.DecodeString(digits); err != nil || len(x.sum) != sha256.Size && len(x.sum) != sha512.Size {
			return nil, errListLine(n)
		}
		if escaped {
			x.name = unescapeName.Replace(x.name)
		}
		list = append(list, x)
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return nil, errors.New("it has a line that is too long for a list of hashes")
	}
	if lines.Err() == nil && len(list) > 1 {
		for _, x := range list {
			if x.nameless {
				return nil, errListLine(x.line)
			}
		}
	}
	return list, lines.Err()
}

func errListLine(n int) error {
	return fmt.Errorf("line %d is not of the form SHA256, two spaces, name, or BLAKE3 (name) = digits", n)
}

// isOfFiles reports whether the list is of files rather than of tensors: whether it names files with the ending .gguf,
// or that of the model.
func (l sumList) isOfFiles(model string) bool {
	for _, x := range l {
		if base := baseName(x.name); strings.HasSuffix(strings.ToLower(base), ".gguf") || base == filepath.Base(model) {
			return true
		}
	}
	return false
}

// baseName returns a name of a list without directories, of any system.
func baseName(name string) string { return path.Base(strings.ReplaceAll(name, `\`, "/")) }

// files returns the digests of files by their names without directories.
func (l sumList) files() (map[string]remote.Expected, error) {
	named := make(map[string]remote.Expected)
	for _, x := range l {
		digest, ok := digestOf(hex.EncodeToString(x.sum))
		if algorithm, _, _ := strings.Cut(digest, ":"); !ok || x.tag != "" && x.tag != strings.ToUpper(algorithm) {
			return nil, fmt.Errorf("line %d: the digest of a file must be a SHA-256 or a SHA-512", x.line)
		}
		base := baseName(x.name)
		if was, twice := named[base]; twice && was.Digest != digest {
			return nil, fmt.Errorf("line %d: file %q occurs twice, with different digests", x.line, base)
		}
		named[base] = remote.Expected{Digest: digest}
	}
	return named, nil
}

// tensors returns the hashes of tensors, and what they are made with.
func (l sumList) tensors() (with loader.HashAlgorithm, m manifest, err error) {
	m = make(manifest)
	for i, x := range l {
		var of loader.HashAlgorithm
		if x.tag != "" {
			err = of.UnmarshalText([]byte(x.tag))
		}
		if err != nil || len(x.sum) != loader.HashSize {
			return with, nil, fmt.Errorf("line %d: the hash of a tensor must be a SHA-256 or a BLAKE3 of 256 bits", x.line)
		}
		if i == 0 {
			with = of
		}
		if of != with {
			return with, nil, fmt.Errorf("line %d has a %v, and the first line a %v", x.line, of, with)
		}
		if _, twice := m[x.name]; twice {
			return with, nil, fmt.Errorf("line %d: tensor %q occurs twice", x.line, x.name)
		}
		m[x.name] = [loader.HashSize]byte(x.sum)
	}
	return with, m, nil
}

// expectedFiles is what the files of a model have to be.
type expectedFiles struct {
	from  string                     // the value of --expect
	named map[string]remote.Expected // by name without directories
	one   remote.Expected            // without names: of a model that is one file

	mu   sync.Mutex
	seen string // the name of that file
}

// of says what the file of that name has to be.
func (e *expectedFiles) of(name string) (remote.Expected, error) {
	if e.named != nil {
		x, ok := e.named[name]
		if !ok {
			return x, withCode(exitMismatch, fmt.Errorf("%s does not list %q", e.from, name))
		}
		return x, nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.seen != "" && e.seen != name {
		return remote.Expected{}, usageErrorf("--expect has the digest of one file, and the model has several: "+
			"use a list with their names (%q, %q)", e.seen, name)
	}
	e.seen = name
	return e.one, nil
}
