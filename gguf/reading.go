package gguf

import (
	"context"
	"sync"
)

// Reading says how a [Source] has to be read, or is read best. The zero value is for sources that do not care.
type Reading struct {
	// Once: every byte comes once, in order, as from a pipe. Ranges must be read one after the other, each behind the
	// last one. Only the header may be read again.
	Once bool
	// MaxRange is how many bytes a range should have at most, so that ranges that are read at the same time are close
	// to each other; 0: any number.
	MaxRange int64
}

// ReadingSource is a [Source] that says how it has to be read.
type ReadingSource interface {
	Source
	Reading() Reading
}

// CheckedSource is a [Source] that knows what its bytes should be, such as a file of a registry that names files by
// their digests. It compares what is read while it is read.
type CheckedSource interface {
	Source
	// Check reads what was not read so far, and returns when it is clear whether all bytes are what they should be. With
	// whole, all tensors of the model have been read. Without it, only a share has, and the source may decide that the
	// rest is too much to read for a check.
	Check(ctx context.Context, whole bool) error
}

// Reading says how the file has to be read: what the sources of all its parts say together.
func (f *File) Reading() Reading {
	var all Reading
	for _, p := range f.parts {
		s, ok := p.source.(ReadingSource)
		if !ok {
			continue
		}
		r := s.Reading()
		all.Once = all.Once || r.Once
		if r.MaxRange > 0 && (all.MaxRange == 0 || r.MaxRange < all.MaxRange) {
			all.MaxRange = r.MaxRange
		}
	}
	return all
}

// Check asks the source of every part that is a [CheckedSource] whether its bytes are what they should be, all at the
// same time, and returns the first error. It returns nil for files on disks.
func (f *File) Check(ctx context.Context, whole bool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	var once sync.Once
	var first error
	for _, p := range f.parts {
		if s, ok := p.source.(CheckedSource); ok {
			wg.Go(func() {
				if err := s.Check(ctx, whole); err != nil {
					once.Do(func() { first = err; cancel(err) })
				}
			})
		}
	}
	wg.Wait()
	return first
}
