package main

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// hashFlags are --hash and --expect. A nil *hashFlags is that of a command that has neither.
type hashFlags struct {
	cmd      *cobra.Command
	to, from *string
	json     *bool
	shard    *shardFlags

	// After prepare.

	with     loader.HashAlgorithm
	path     string       // of --hash, without the algorithm
	expected *expectation // with --expect
}

func addHashFlags(cmd *cobra.Command, json *bool) *hashFlags {
	fs := cmd.Flags()
	return &hashFlags{
		cmd: cmd, json: json,
		to: fs.String("hash", "", "write the SHA-256 of each tensor's bytes in MODEL (of a slice, of its own) to this file, "+
			"as sha256sum does (-: stdout); blake3:FILE is BLAKE3, on all cores"),
		from: fs.String("expect", "", "compare each tensor's hash with this file, made by --hash; or MODEL's files with "+
			"sha256:DIGITS, a .sha256 file, or a pointer of Git LFS; exit status 6 if something differs"),
	}
}

// given reports whether one of the flags is.
func (h *hashFlags) given() bool { return h != nil && (*h.to != "" || *h.from != "") }

// wanted reports whether the loader has to hash tensors. It is for after prepare.
func (h *hashFlags) wanted() bool {
	return h != nil && (*h.to != "" || h.expected != nil && h.expected.tensors != nil)
}

// algorithm is what tensors are hashed with, for reports; "" if they are not.
func (h *hashFlags) algorithm() string {
	if !h.wanted() {
		return ""
	}
	return h.with.String()
}

// expect says what the files of the model have to be; nil if --expect is not about files.
func (h *hashFlags) expect() func(name string) (remote.Expected, error) {
	if h == nil || h.expected == nil || h.expected.files == nil {
		return nil
	}
	return h.expected.files.of
}

// hashTarget takes the value of --hash apart: [ALGORITHM:]FILE, or ALGORITHM alone, for stdout.
func hashTarget(value string) (with loader.HashAlgorithm, path string) {
	before, after, ok := strings.Cut(value, ":")
	switch {
	case with.UnmarshalText([]byte(before)) != nil:
		return loader.SHA256, value
	case !ok || after == "":
		return with, "-"
	}
	return with, after
}

// otherAlgorithm returns the hash function that a value of --hash names, if it is one that is not offered; else "".
func otherAlgorithm(value string) string {
	word, _, _ := strings.Cut(value, ":")
	if others.MatchString(word) {
		return word
	}
	return ""
}

// others are names of hash functions that are not offered.
var others = regexp.MustCompile(`^(?i)(md[245]|sha-?1|sha-?(224|384|512)|sha3(-\d+)?|blake2[bs]?|crc-?(32c?|64)|xxh?(hash|32|64|3|128)?)$`)

// ownsStdout reports whether stdout is for the hashes alone.
func (h *hashFlags) ownsStdout() bool {
	if h == nil {
		return false
	}
	_, path := hashTarget(*h.to)
	return path == "-"
}

// outputs returns what finish writes.
func (h *hashFlags) outputs() []plannedOutput {
	if h == nil {
		return nil
	}
	_, path := hashTarget(*h.to)
	return []plannedOutput{
		{flag: "--hash", path: h.shard.expand(path), stdout: true},
		{flag: "--expect", path: h.shard.expand(*h.from), read: true},
	}
}

// prepare finds out before the load of the model of that name what would be in the way after it.
func (h *hashFlags) prepare(name string) (err error) {
	if h == nil {
		return nil
	}
	if other := otherAlgorithm(*h.to); other != "" {
		return usageErrorf("--hash %q: %s is not offered, only sha256 and blake3; a file of that name is ./%s", *h.to, other, *h.to)
	}
	if h.ownsStdout() && *h.json {
		return usageErrorf("--hash - and --json both want stdout; write the hashes to a file")
	}
	h.with, h.path = hashTarget(*h.to)
	if *h.from == "" {
		return nil
	}
	if h.expected, err = readExpectation(h.shard.expand(*h.from), name); err != nil {
		return err
	}
	if h.expected.tensors == nil {
		return nil
	}
	if *h.to != "" && h.with != h.expected.with {
		return usageErrorf("--hash with %v and --expect with %v want two hashes of each tensor; use one of them for both",
			h.with, h.expected.with)
	}
	h.with = h.expected.with
	return nil
}

// finish writes and compares the hashes of what has been loaded.
func (h *hashFlags) finish(s *loaded) error {
	if !h.given() {
		return nil
	}
	hashes := s.weights.Hashes()
	var err error
	switch h.path {
	case "":
	case "-":
		err = writeManifest(h.cmd.OutOrStdout(), h.with, hashes)
	default:
		err = writeFile(h.shard.expand(h.path), func(o *outputFile) error { return writeManifest(o, h.with, hashes) })
	}
	if err != nil || h.expected == nil {
		return err
	}
	if h.expected.tensors != nil {
		inFile := func(name string) bool { _, ok := s.file.Tensor(name); return ok }
		if err := h.expected.tensors.compare(h.with, hashes, inFile); err != nil {
			return withCode(exitMismatch, fmt.Errorf("%s is not what %s says: %w", s.path, *h.from, err))
		}
	}
	s.asExpected = h.expected.what()
	return nil
}
