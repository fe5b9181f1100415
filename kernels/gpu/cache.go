package gpu

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	// cacheMagic is what every file of the cache begins with. Its number changes with the format of the files.
	cacheMagic = "gguf2gpu code object 1\n"
	// maxCode bounds the size of a file in bytes. Kernels are far smaller.
	maxCode = 64 << 20
)

// openCache sets Dir to the default directory if it is empty, or to NoCache if the user has no cache directory.
func (b *build) openCache() {
	if b.Dir != "" {
		return
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		b.Dir = NoCache
		b.Logger.Debug("compiled kernels are not kept", "error", err)
		return
	}
	b.Dir = filepath.Join(dir, "gguf2gpu", "kernels")
}

// entry returns the name of the cache entry for r: a hash of everything that the code object depends on.
func (b *build) entry(r Request) string {
	identity, err := json.Marshal(struct {
		Request
		Kind, HipRTC, Arch string
		Version, Driver    int
	}{r, b.dev.Runtime().Kind(), b.hiprtc, b.dev.Arch(), b.version, b.driver})
	if err != nil {
		panic(err) // cannot be: the struct has strings and numbers only
	}
	sum := sha256.Sum256(identity)
	return hex.EncodeToString(sum[:])
}

// path returns the file of an entry.
func (b *build) path(name string) string { return filepath.Join(b.Dir, name+".co") }

// read returns the code object of an entry, or nil if there is none that is whole and can be trusted.
func (b *build) read(name string) []byte {
	if b.Dir == NoCache {
		return nil
	}
	object, err := readEntry(b.path(name), name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.Logger.Debug("a kernel in the cache is of no use", "file", b.path(name), "error", err)
	}
	return object
}

// readEntry reads the file of an entry, which is entryHead and then the code object.
func readEntry(path, name string) ([]byte, error) {
	f, err := openEntry(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := trusted(info); err != nil {
		return nil, err
	}
	if info.Size() > maxCode {
		return nil, fmt.Errorf("it has %d bytes, at most %d are expected", info.Size(), maxCode)
	}
	all, err := io.ReadAll(io.LimitReader(f, maxCode))
	if err != nil {
		return nil, err
	}
	head := len(entryHead(name, nil))
	if len(all) <= head || !bytes.Equal(all[:head], entryHead(name, all[head:])) {
		return nil, errors.New("it is damaged, or not an entry of this name")
	}
	return all[head:], nil
}

// entryHead returns what comes before the code object in the file of an entry: a line each for the magic, the entry's
// name and the SHA-256 of the code object.
func entryHead(name string, object []byte) []byte {
	return fmt.Appendf(nil, "%s%s\n%x\n", cacheMagic, name, sha256.Sum256(object))
}

// write writes a code object to the cache. If it cannot, it logs one warning: kernels can be used all the same.
func (b *build) write(name string, object []byte) {
	if b.Dir == NoCache {
		return
	}
	if err := writeEntry(b.path(name), name, object); err != nil && !b.warned.Swap(true) {
		b.Logger.Warn("compiled kernels cannot be kept, so the next run compiles again", "directory", b.Dir, "error", err)
	}
}

// writeEntry writes the file of an entry under another name and renames it, as other processes may read or write the
// same entry. If the system crashes meanwhile, readEntry notices what is damaged.
func writeEntry(path, name string, object []byte) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, name+".*.tmp") // with permissions for this user only
	if err != nil {
		return err
	}
	_, err = f.Write(append(entryHead(name, object), object...))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
