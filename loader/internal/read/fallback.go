package read

import (
	"errors"
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Fallback says that a file is not read in the way that Auto prefers, because that does not work.
type Fallback struct {
	Path    string // of the part
	Instead string // what is done: "ordinary reads" or "the mapping"
	Err     error  // what does not work
}

// What is done instead.
const (
	ordinaryReads = "ordinary reads"
	theMapping    = "the mapping"
)

var errUnmapped = errors.New("the file cannot be mapped into memory: its file system, or a limit, does not let it")

// fellBack tells of the first fallback. The others are of the same kind, mostly.
func (s *Source) fellBack(ps *part, instead string, err error) {
	if s.o.Fallback != nil {
		s.told.Do(func() { s.o.Fallback(Fallback{ps.Path, instead, err}) })
	}
}

// unmapped decides how to read a file of this system that could not be mapped. Package gguf reads it through a Source
// then.
func (s *Source) unmapped(ps *part) error {
	if !ps.local() || ps.remote == nil {
		return nil
	}
	switch s.o.Mode {
	case Mapped:
		return fmt.Errorf("%s: %w; auto reads it in another way", ps.Path, errUnmapped)
	case Direct:
		ps.remote = nil
	default:
		s.fellBack(ps, ordinaryReads, errUnmapped)
	}
	return nil
}

// descriptorFor is the descriptor that r.segs are to be read with.
func (r *Reader) descriptorFor(ps *part) *descriptor {
	if r.src.o.Mode == Direct {
		return &ps.direct
	}
	if ps.noDirect.Load() || r.src.group.Tensors[r.segs[0].Tensor].Pieces() {
		return &ps.plain // of slices: other ranks of this host want what lies between, and then find it in the page cache
	}
	return &ps.direct
}

// readFile reads r.segs, a run in ps, with direct reads. Where these do not work it takes ordinary ones, if it may,
// and the mapping where the file cannot be opened any more.
func (r *Reader) readFile(ps *part) error {
	x, auto := &r.file, r.src.o.Mode == Auto
	x.rooms = x.rooms[:0]
	d := r.descriptorFor(ps)
	var why error // of a fallback
	for {
		f, err := d.get()
		opened := err == nil
		if opened {
			if err := r.takeRooms(); err != nil {
				return err
			}
			err = r.fetch(ps, d, f)
		}
		direct := d == &ps.direct
		switch {
		case err == nil:
			if why != nil {
				r.src.fellBack(ps, ordinaryReads, why)
			}
			return r.deliver(direct)
		case opened && errors.Is(err, gguf.ErrTruncated):
			return err
		case opened && direct && x.inRooms > 0 && unfit(err):
			ps.noRooms.Store(true) // again, into the scratch buffer
		case direct && auto:
			ps.noDirect.Store(true)
			d, why = &ps.plain, err
		case !opened && auto && ps.bytes != nil:
			if why == nil {
				why = err
			}
			r.src.fellBack(ps, theMapping, why)
			return r.fromMapping(ps)
		case direct && (!opened || unfit(err)):
			return fmt.Errorf("direct reads do not work on this file, auto reads it in another way: %w", err)
		default:
			return err
		}
	}
}

// fromMapping puts r.segs from the mapping, some of which may have their rooms.
func (r *Reader) fromMapping(ps *part) error {
	_, lo, _ := r.src.extent(&r.segs[0])
	_, _, hi := r.src.extent(&r.segs[len(r.segs)-1])
	for w := lo / windowBytes; w <= (hi-1)/windowBytes; w++ {
		ps.windows[w].transport.Store(byMapping)
	}
	if len(r.file.rooms) == 0 {
		return r.src.file.Guard(r.mapped)
	}
	return r.src.file.Guard(func() error {
		for i := range r.segs {
			_, lo, hi := r.src.extent(&r.segs[i])
			if err := r.putPart(&r.segs[i], r.file.rooms[i], ps.bytes[lo:hi]); err != nil {
				return err
			}
			r.src.mapped.Add(hi - lo)
		}
		return nil
	})
}

// putPart gives all bytes of a segment to the sink, which has given room for them.
func (r *Reader) putPart(s *plan.Segment, room, src []byte) error {
	r.refused = r.sink.PutPart(s, s.Src, room, src)
	return r.refused
}
