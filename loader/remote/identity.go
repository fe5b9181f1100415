package remote

import (
	"encoding/hex"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Identity tells a file on a server from another one; see [gguf.Identity].
type Identity = gguf.Identity

// Identify returns the identity of a part of a model. ok is false for files on disks and for sources of other packages.
func Identify(p *gguf.Part) (id Identity, ok bool) { return p.Identity() }

// Identity returns what is known of the file so far.
func (f *file) Identity() Identity {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := Identity{URL: f.path, Digest: f.a.digest, Revision: f.a.revision}
	if f.id == nil {
		return id
	}
	id.Size, id.ETag, id.Modified = f.id.size, f.id.first.etag, f.id.first.modified
	if f.id.linked != "" {
		id.ETag = f.id.linked
	}
	if digits := strings.Trim(f.id.linked, `"`); id.Digest == "" && len(digits) == 64 {
		if _, err := hex.DecodeString(digits); err == nil {
			id.Digest = "sha256:" + strings.ToLower(digits)
		}
	}
	if id.ETag != "" {
		id.Modified = ""
	}
	return id
}
