package gguf

import (
	"cmp"
	"errors"
	"fmt"
)

// Identity tells a file on a server from another one, and from what it is after a change. It is a value that can be
// stored. What is not known is empty.
type Identity struct {
	URL      string `json:"url"` // without credentials and query
	Size     int64  `json:"size"`
	ETag     string `json:"etag,omitempty"`     // of the server that the address names
	Modified string `json:"modified,omitempty"` // likewise, if there is no ETag
	Digest   string `json:"digest,omitempty"`   // "sha256:" or "sha512:" and hexadecimal digits, of the whole file
	Revision string `json:"revision,omitempty"` // of what the file is part of, such as a commit
	Checked  bool   `json:"checked,omitempty"`  // the bytes were compared with the digest
}

// IdentifiedSource is a [Source] that knows what its file is.
type IdentifiedSource interface {
	Source
	Identity() Identity
}

// Identity returns what the part's source knows of its file. ok is false for files on disks, see [Part.Info], and for
// sources that know nothing.
func (p *Part) Identity() (id Identity, ok bool) {
	s, ok := p.source.(IdentifiedSource)
	if !ok {
		return id, false
	}
	return s.Identity(), true
}

// errUnknown is in the error of Same when there is nothing to compare.
var errUnknown = errors.New("nothing is known of it that would tell whether it has changed")

// Same returns nil if two identities are of the same content: sizes are the same, and digests, or where there are none,
// address and ETag, or date. Otherwise the error matches ErrReplaced.
func (id Identity) Same(now Identity) error {
	differs := func(what, now, was string) error {
		return fmt.Errorf("%s: %w: its %s is %.100q, and was %.100q", now, ErrReplaced, what, now, was)
	}
	switch {
	case id.Size != now.Size:
		return fmt.Errorf("%s: %w: it has %d bytes, and had %d", now.URL, ErrReplaced, now.Size, id.Size)
	case id.Digest != "" && now.Digest != "":
		if id.Digest != now.Digest {
			return differs("digest", now.Digest, id.Digest)
		}
	case id.URL == now.URL && cmp.Or(id.ETag, now.ETag) != "":
		if id.ETag != now.ETag {
			return differs("ETag", now.ETag, id.ETag)
		}
	case id.URL == now.URL && id.Modified != "":
		if id.Modified != now.Modified {
			return differs("date", now.Modified, id.Modified)
		}
	default:
		return fmt.Errorf("%s: %w: %w", now.URL, ErrReplaced, errUnknown)
	}
	return nil
}
