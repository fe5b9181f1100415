package gguf

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"

	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

// The keys that llama.cpp's splitter writes into every part.
const (
	splitNoKey      = "split.no"            // number of the part, from 0 on
	splitCountKey   = "split.count"         // number of parts; 0 or 1 in a whole file, such as a merged one
	splitTensorsKey = "split.tensors.count" // of all parts together
)

// splitName matches the only form of name by which llama.cpp finds the parts of a file. Numbers count from 1.
var splitName = regexp.MustCompile(`^(.*)-([0-9]{5})-of-([0-9]{5})\.gguf$`)

// openSplit opens the other parts of the split that p is a part of, by their names, and returns all parts in order. On
// an error it returns the parts opened so far, p among them, for the caller to close.
func openSplit(p *Part, open opener) ([]*Part, error) {
	no, count, err := p.split()
	if err != nil || count == 1 {
		return []*Part{p}, err
	}
	// The names of the other parts differ from this one's in the number only, so they cannot lead out of its directory.
	prefix := splitName.FindStringSubmatch(p.name)[1]
	opened := []*Part{p}
	var parts []*Part
	for i := range count {
		q := p
		if i != no {
			name := fmt.Sprintf("%s-%05d-of-%05d.gguf", prefix, i+1, count)
			q, err = open(name)
			if errors.Is(err, fs.ErrNotExist) {
				err = &FormatError{Path: beside(p, name), Offset: -1, Err: fmt.Errorf(
					"%w: part %d of the %d of this model is missing: %w", ErrSplit, i+1, count, err)}
			}
			if err != nil {
				return opened, err
			}
			opened = append(opened, q)
		}
		parts = append(parts, q)
		if err := q.checkSplit(parts[0], i, count); err != nil {
			return opened, err
		}
	}
	if err := checkTensorCount(parts); err != nil {
		return parts, err
	}
	return parts, readAllAlike(parts)
}

// readAllAlike makes sources of all parts if some could be mapped and others not, so that no caller has to tell them
// apart.
func readAllAlike(parts []*Part) error {
	sources := 0
	for _, p := range parts {
		if p.source != nil {
			sources++
		}
	}
	if sources == 0 || sources == len(parts) {
		return nil
	}
	for _, p := range parts {
		if p.source != nil {
			continue
		}
		f, err := p.Open(0)
		if err != nil {
			return err
		}
		s := &fileSource{path: p.Path, file: f, size: p.Size}
		if p.view { // its header is a slice of the mapping
			p.data, p.kept, p.source = nil, p.data, s
			continue
		}
		err = p.close()
		p.data, p.source = nil, s
		if err != nil {
			return err
		}
	}
	return nil
}

// beside returns the path of the file called name that is a neighbour of p.
func beside(p *Part, name string) string {
	if p.info == nil {
		return name // of a Source: the error that follows names the address
	}
	return filepath.Join(filepath.Dir(p.Path), name)
}

// split returns that p is part no of count, counted from 0. A file that is no part of a split is part 0 of 1. For a
// part, the file's name and its metadata must agree, as each alone is easily wrong: a part that was renamed, or copied
// over another.
func (p *Part) split() (no, count int, err error) {
	name := splitName.FindStringSubmatch(p.name)
	nameNo, nameCount := 1, 1
	if name != nil {
		nameNo, _ = strconv.Atoi(name[2]) // five digits
		nameCount, _ = strconv.Atoi(name[3])
	}
	count, ok, err := p.splitKey(splitCountKey)
	switch {
	case err != nil:
		return 0, 0, err
	case !ok && nameCount > 1:
		return 0, 0, p.keyError(splitCountKey, "%w: the name says part %d of %d, but the key is missing; "+
			"a whole model needs another name", ErrSplit, nameNo, nameCount)
	case count <= 1: // also without the key; a file that was merged keeps the other keys, which mean nothing then
		return 0, 1, nil
	}
	no, ok, err = p.splitKey(splitNoKey)
	switch {
	case err != nil:
		return 0, 0, err
	case !ok:
		return 0, 0, p.keyError(splitNoKey, "%w: key is missing beside %s", ErrSplit, splitCountKey)
	case no >= count:
		return 0, 0, p.keyError(splitNoKey, "%w: %d of %d parts, counted from 0", ErrSplit, no, count)
	case name == nil:
		return 0, 0, p.keyError(splitCountKey, "%w: this is part %d of %d, but it is not named "+
			"NAME-%05[2]d-of-%05[3]d.gguf, so the others cannot be found", ErrSplit, no+1, count)
	case nameCount != count:
		return 0, 0, p.keyError(splitCountKey, "%w: %d, but the file's name says %d", ErrSplit, count, nameCount)
	case nameNo != no+1:
		return 0, 0, p.keyError(splitNoKey, "%w: this is part %d, but the file's name says %d", ErrSplit, no+1, nameNo)
	}
	return no, count, nil
}

// splitKey returns a number that the splitter has written. It writes integers of 16 and 32 bits; any integer is
// accepted.
func (p *Part) splitKey(key string) (n int, ok bool, err error) {
	v, ok := p.metadata.Get(key)
	if !ok {
		return 0, false, nil
	}
	i, isInt := v.Int()
	if !isInt || i < 0 || i > 1<<31-1 {
		return 0, false, p.keyError(key, "%w: %v (%v) is no count", ErrSplit, v.brief(briefElem), v.Kind())
	}
	return int(i), true, nil
}

// checkSplit checks that p is part i of count, counted from 0, and agrees with the first part.
func (p *Part) checkSplit(first *Part, i, count int) error {
	ownNo, ownCount, err := p.split()
	switch {
	case err != nil:
		return err
	case ownNo != i || ownCount != count:
		return p.keyError(splitNoKey, "%w: part %d of %d where %d of %d is expected",
			ErrSplit, ownNo+1, ownCount, i+1, count)
	case p.Version != first.Version:
		return &FormatError{Path: p.Path, Offset: 4, Field: "version", Err: fmt.Errorf(
			"%w: version %d, but %d in %s", ErrSplit, p.Version, first.Version, term.Safe(first.Path))}
	}
	// Later parts need not repeat the first one's metadata, not even its alignment. What they repeat has to agree.
	if v, ok := p.metadata.Uint(alignmentKey); ok && uint32(v) != first.Alignment {
		return p.keyError(alignmentKey, "%w: %d, but %d in %s", ErrSplit, v, first.Alignment, term.Safe(first.Path))
	}
	for _, key := range []string{"general.uuid", "general.architecture"} {
		a, okA := first.metadata.Get(key)
		if b, okB := p.metadata.Get(key); okA && okB && a != b {
			return p.keyError(key, "%w: %v, but %v in %s",
				ErrSplit, b.brief(briefElem), a.brief(briefElem), term.Safe(first.Path))
		}
	}
	return nil
}

// checkTensorCount compares the number of tensors with the one that every part states for all of them.
func checkTensorCount(parts []*Part) error {
	total := 0
	for _, p := range parts {
		total += p.infos
	}
	for _, p := range parts {
		n, ok, err := p.splitKey(splitTensorsKey)
		if err != nil {
			return err
		}
		if ok && n != total {
			return p.keyError(splitTensorsKey, "%w: %d, but the parts hold %d tensors", ErrSplit, n, total)
		}
	}
	return nil
}
