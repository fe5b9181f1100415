package gguf

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
	"strconv"
)

// The keys that llama.cpp's splitter writes into every part.
const (
	splitNoKey      = "split.no"            // 0-based
	splitCountKey   = "split.count"         // number of parts
	splitTensorsKey = "split.tensors.count" // of all parts together
)

// splitName is the only form of name under which llama.cpp finds the parts of a model; numbers count from 1.
var splitName = regexp.MustCompile(`^(.*)-([0-9]{5})-of-([0-9]{5})\.gguf$`)

// openSplit opens the other parts of the model that p belongs to, by their names, and returns all in order. On an error the
// parts opened so far, p among them, are returned too, for the caller to close.
func openSplit(p *Part, open opener) ([]*Part, error) {
	no, count, err := p.split()
	if err != nil || count == 1 {
		return []*Part{p}, err
	}
	// The neighbours' names differ from this one's in a number only, so they cannot lead out of its directory.
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
		if err := q.follows(parts[0], i, count); err != nil {
			return opened, err
		}
	}
	return parts, countTensors(parts)
}

// beside is where the file called name is if it is a neighbour of p.
func beside(p *Part, name string) string {
	if p.source != nil {
		return name // the error that follows knows the address
	}
	return filepath.Join(filepath.Dir(p.Path), name)
}

// split returns which part of how many p is; a file that is a model by itself is part 0 of 1. The file's name and its
// metadata have to agree, as each alone is easily wrong: a part that was renamed, or copied over another.
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
	case !ok:
		return 0, 1, nil
	case count == 0:
		return 0, 0, p.keyError(splitCountKey, "%w: no parts", ErrSplit)
	}
	no, ok, err = p.splitKey(splitNoKey)
	switch {
	case err != nil:
		return 0, 0, err
	case !ok:
		return 0, 0, p.keyError(splitNoKey, "%w: key is missing beside %s", ErrSplit, splitCountKey)
	case no >= count:
		return 0, 0, p.keyError(splitNoKey, "%w: %d of %d parts, counted from 0", ErrSplit, no, count)
	case name == nil && count > 1:
		return 0, 0, p.keyError(splitCountKey, "%w: this is part %d of %d, but it is not named "+
			"NAME-%05[2]d-of-%05[3]d.gguf, so the others cannot be found", ErrSplit, no+1, count)
	case name != nil && nameCount != count:
		return 0, 0, p.keyError(splitCountKey, "%w: %d, but the file's name says %d", ErrSplit, count, nameCount)
	case name != nil && nameNo != no+1:
		return 0, 0, p.keyError(splitNoKey, "%w: this is part %d, but the file's name says %d", ErrSplit, no+1, nameNo)
	}
	return no, count, nil
}

// splitKey returns a number that the splitter wrote. It writes 16 and 32 bits; any integer is taken.
func (p *Part) splitKey(key string) (n int, ok bool, err error) {
	v, ok := p.metadata.Get(key)
	if !ok {
		return 0, false, nil
	}
	i, isInt := v.Int()
	if !isInt || i < 0 || i > 1<<31-1 {
		return 0, false, p.keyError(key, "%w: %v (%v) is no count", ErrSplit, v, v.Kind())
	}
	return int(i), true, nil
}

// follows checks that p is part i of count and fits the first part.
func (p *Part) follows(first *Part, i, count int) error {
	ownNo, ownCount, err := p.split()
	switch {
	case err != nil:
		return err
	case ownNo != i || ownCount != count:
		return p.keyError(splitNoKey, "%w: part %d of %d where %d of %d is expected",
			ErrSplit, ownNo+1, ownCount, i+1, count)
	case p.Version != first.Version:
		return &FormatError{Path: p.Path, Offset: 4, Field: "version", Err: fmt.Errorf(
			"%w: version %d, but %d in %s", ErrSplit, p.Version, first.Version, first.Path)}
	}
	// Later parts need not repeat the first one's metadata, not even its alignment; what they repeat has to agree.
	if v, ok := p.metadata.Uint(alignmentKey); ok && uint32(v) != first.Alignment {
		return p.keyError(alignmentKey, "%w: %d, but %d in %s", ErrSplit, v, first.Alignment, first.Path)
	}
	for _, key := range []string{"general.uuid", "general.architecture"} {
		a, okA := first.metadata.Get(key)
		if b, okB := p.metadata.Get(key); okA && okB && a != b {
			return p.keyError(key, "%w: %v, but %v in %s", ErrSplit, b, a, first.Path)
		}
	}
	return nil
}

// countTensors compares the number of tensors with the one that every part gives for all.
func countTensors(parts []*Part) error {
	total := 0
	for _, p := range parts {
		total += p.records()
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
