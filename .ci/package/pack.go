// Command pack makes archives whose bytes depend on nothing but the files in them and SOURCE_DATE_EPOCH: entries are
// sorted, belong to root, have one of two modes and one time. Go's own packages write them, so that it makes no
// difference which tar, gzip and zip a machine has.
//
//	pack archive OUT DIR                 DIR as OUT, which ends in .tar.gz or .zip; entries begin with DIR's last element
//	pack root OUT DIR                    the same, but what is in DIR is at the top: a layer of a container image
//	pack image TAR OS/ARCH KEY=VALUE...  the container image in TAR, of that platform, runs gguf2gpu and has these labels
//	pack gzip FILE...                    each FILE becomes FILE.gz
//	pack sums DIR                        the SHA-256 of each file in DIR, as DIR/SHA256SUMS
package main

import (
	"archive/tar"
	"archive/zip"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 3 && args[0] == "archive":
		return archive(args[1], args[2], filepath.Base(args[2]))
	case len(args) == 3 && args[0] == "root":
		return archive(args[1], args[2], "")
	case len(args) > 2 && args[0] == "image":
		return describeImage(args[1], args[2], args[3:])
	case len(args) > 1 && args[0] == "gzip":
		for _, name := range args[1:] {
			if err := compress(name); err != nil {
				return err
			}
		}
		return nil
	case len(args) == 2 && args[0] == "sums":
		return sums(args[1])
	}
	return errors.New("usage: pack archive OUT DIR | root OUT DIR | image TAR OS/ARCH KEY=VALUE... | gzip FILE... | sums DIR")
}

// writer is what tar and zip have in common here.
type writer interface {
	add(name string, mode fs.FileMode, content []byte) error // mode has fs.ModeDir for a directory
	Close() error
}

// sourceDate is the time that everything gets.
func sourceDate() (time.Time, error) {
	seconds, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH must be seconds since 1970: %w", err)
	}
	return time.Unix(seconds, 0).UTC(), nil
}

// archive writes what is below dir to out. The names of entries begin with top.
func archive(out, dir, top string) (err error) {
	date, err := sourceDate()
	if err != nil {
		return err
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var w writer
	switch {
	case strings.HasSuffix(out, ".tar.gz"):
		// The header of gzip has neither name nor time.
		gz, err := gzip.NewWriterLevel(f, gzip.BestCompression)
		if err != nil {
			return err
		}
		w = &tarGz{tar.NewWriter(gz), gz, date}
	case strings.HasSuffix(out, ".zip"):
		w = &zipped{zip.NewWriter(f), date}
	default:
		return fmt.Errorf("%s: the name must end in .tar.gz or .zip", out)
	}
	// WalkDir goes through names in lexical order, in every locale.
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		entry := path.Join(top, filepath.ToSlash(rel))
		if entry == "." {
			return nil
		}
		if d.IsDir() {
			return w.add(entry+"/", fs.ModeDir|0o755, nil)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("%s is no ordinary file", name)
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if info.Mode()&0o100 != 0 {
			mode = 0o755
		}
		return w.add(entry, mode, content)
	})
	return errors.Join(err, w.Close())
}

// tarGz writes a compressed tar.
type tarGz struct {
	tar  *tar.Writer
	gz   *gzip.Writer
	date time.Time
}

func (t *tarGz) add(name string, mode fs.FileMode, content []byte) error {
	h := tar.Header{
		Typeflag: tar.TypeReg, Name: name, Mode: int64(mode.Perm()), Size: int64(len(content)), ModTime: t.date,
		Uname: "root", Gname: "root", Format: tar.FormatUSTAR,
	}
	if mode.IsDir() {
		h.Typeflag = tar.TypeDir
	}
	if err := t.tar.WriteHeader(&h); err != nil {
		return err
	}
	_, err := t.tar.Write(content)
	return err
}

// Close ends the tar and the compression. The caller closes the file.
func (t *tarGz) Close() error { return errors.Join(t.tar.Close(), t.gz.Close()) }

// zipped writes a zip.
type zipped struct {
	zip  *zip.Writer
	date time.Time
}

func (z *zipped) add(name string, mode fs.FileMode, content []byte) error {
	h := zip.FileHeader{Name: name, Method: zip.Deflate, Modified: z.date}
	if mode.IsDir() {
		h.Method = zip.Store
	}
	h.SetMode(mode)
	w, err := z.zip.CreateHeader(&h)
	if err != nil || mode.IsDir() {
		return err
	}
	_, err = w.Write(content)
	return err
}

// Close ends the zip. The caller closes the file.
func (z *zipped) Close() error { return z.zip.Close() }

// compress replaces a file by a compressed one.
func compress(name string) (err error) {
	content, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	f, err := os.Create(name + ".gz")
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err == nil {
			err = os.Remove(name)
		}
	}()
	w, err := gzip.NewWriterLevel(f, gzip.BestCompression)
	if err != nil {
		return err
	}
	_, err = w.Write(content)
	return errors.Join(err, w.Close())
}

// sums writes SHA256SUMS as sha256sum does. 'sha256sum -c' checks it.
func sums(dir string) error {
	const list = "SHA256SUMS"
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return err
	}
	var lines strings.Builder
	for _, e := range entries {
		if e.Name() == list || !e.Type().IsRegular() {
			continue
		}
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		h := sha256.New()
		_, err = io.Copy(h, f)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		fmt.Fprintf(&lines, "%x  %s\n", h.Sum(nil), e.Name())
	}
	return os.WriteFile(filepath.Join(dir, list), []byte(lines.String()), 0o644)
}
