package hold

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// ErrOtherFile is matched by the error of SameFile when a file is not what a model was loaded from.
var ErrOtherFile = errors.New("not the file that the model was loaded from")

// FileIdentity tells a model's file from another one, and from what it is after a change.
type FileIdentity struct {
	Path         string `json:"path"` // absolute; of what is no file, its address
	Size         int64  `json:"size"`
	ModTime      int64  `json:"mtime_ns"`      // of the last change, nanoseconds since 1970
	HeaderSHA256 string `json:"header_sha256"` // of everything before the tensors' bytes, in hexadecimal
	// Name is what the model was opened by, and Source what is known of what it is: digest, ETag, revision. Of files both
	// are empty.
	Name   string         `json:"name,omitempty"`
	Source *gguf.Identity `json:"source,omitempty"`
	// Once says that it came as a stream, of which only size and header are known.
	Once bool `json:"once,omitempty"`
}

// SameFile reports whether f is the file, of one part or several, that a model was loaded from: files is Info.Files. It
// compares sizes and headers, and of what is no file, digests, or else addresses and ETags. Call it before
// readback.Verify, which compares the tensors. The error matches ErrOtherFile when they differ; others are those of
// reading f.
func SameFile(files []FileIdentity, f *gguf.File) error {
	have, err := identify(f, "")
	if err != nil {
		return err
	}
	if len(have) != len(files) {
		return fmt.Errorf("hold: %d parts, the model was loaded from %d: %w", len(have), len(files), ErrOtherFile)
	}
	for i, x := range have {
		if was := files[i]; x.Size != was.Size || x.HeaderSHA256 != was.HeaderSHA256 {
			return fmt.Errorf("hold: %s is not, or is no longer, what was loaded: %w", x.Path, ErrOtherFile)
		}
		if x.Source == nil || files[i].Source == nil { // a copy of the other
			continue
		}
		if err := files[i].Source.Same(*x.Source); err != nil {
			return fmt.Errorf("hold: %w: %w", err, ErrOtherFile)
		}
	}
	return nil
}

// identify describes the parts of f, which was opened by name if it is no file.
func identify(f *gguf.File, name string) ([]FileIdentity, error) {
	var files []FileIdentity
	for _, p := range f.Parts() {
		info := p.Info()
		if info == nil {
			id, err := identifySource(p, name, f.Reading().Once)
			if err != nil {
				return nil, err
			}
			files = append(files, id)
			continue
		}
		path, err := filepath.Abs(p.Path)
		if err != nil {
			return nil, err
		}
		if name != "" { // a descriptor: its path is for this process alone
			if real, err := os.Readlink(path); err == nil {
				path = real
			}
		}
		id := FileIdentity{Path: path, Size: p.Size, ModTime: info.ModTime().UnixNano()}
		err = f.Guard(func() error {
			sum := sha256.Sum256(p.Bytes()[:min(p.DataOffset, p.Size)])
			id.HeaderSHA256 = hex.EncodeToString(sum[:])
			return nil
		})
		if err != nil {
			return nil, err
		}
		files = append(files, id)
	}
	return files, nil
}

// identifySource describes a part that is not a file. Its header is read once more; a stream keeps it.
func identifySource(p *gguf.Part, name string, once bool) (FileIdentity, error) {
	id := FileIdentity{Path: p.Path, Size: p.Size, Name: name, Once: once}
	if source, ok := p.Identity(); ok {
		id.Source = &source
	} else if !once {
		return FileIdentity{}, fmt.Errorf("hold: there is nothing to tell whether %s has changed: use a file", p.Path)
	}
	sum := sha256.New()
	r := p.Source().Range(context.Background(), 0, min(p.DataOffset, p.Size))
	_, err := io.Copy(sum, r)
	if err = errors.Join(err, r.Close()); err != nil {
		return FileIdentity{}, err
	}
	id.HeaderSHA256 = hex.EncodeToString(sum.Sum(nil))
	return id, nil
}

// Opener opens models that are not files, such as an Opener of package loader/remote/models.
type Opener interface {
	// Opens reports whether a name is for it. Other names are paths of files.
	Opens(name string) bool
	// Open opens the model of that name. The caller closes the file.
	Open(ctx context.Context, name string) (*gguf.File, error)
}

// opens reports whether a name is for the Opener, if there is one.
func (o *Options) opens(name string) bool { return o.Opener != nil && o.Opener.Opens(name) }

// open opens the model at a path, or of a name that is for the Opener.
func (o *Options) open(ctx context.Context, path string) (*gguf.File, error) {
	if !o.opens(path) {
		return gguf.Open(path)
	}
	return o.Opener.Open(ctx, path)
}

// nameOf is what a model was opened by; "" for a file.
func (o *Options) nameOf(m *held) string {
	if o.opens(m.path) {
		return m.path
	}
	return ""
}
