package loader

import (
	"crypto/sha256"
	"hash"
)

// TensorHash is the SHA-256 of a tensor's bytes in the file.
type TensorHash struct {
	Name string
	Sum  [sha256.Size]byte
}

// Hashes returns the hashes that Options.Hash asked for, in file order, once the load has ended well; nil otherwise. They are
// those of the very bytes that were loaded, not of a second look at the file.
func (w *Model) Hashes() []TensorHash {
	select {
	case <-w.finished:
	default:
		return nil
	}
	if w.sums == nil || w.err != nil {
		return nil
	}
	all := make([]TensorHash, len(w.sums))
	for i := range all {
		all[i] = TensorHash{w.plan.Tensors[i].Name, w.sums[i]}
	}
	return all
}

// newSums returns the place for the tensors' hashes, if they are wanted.
func newSums(p *Plan) [][sha256.Size]byte {
	if !p.opts.Hash {
		return nil
	}
	sums := make([][sha256.Size]byte, len(p.Tensors))
	for i := range sums {
		sums[i] = sha256.Sum256(nil) // for tensors without elements, which nobody reads
	}
	return sums
}

// inspector looks at the file's bytes on their way, as Options.Check and Options.Hash ask. Nil does nothing. Each worker has
// its own.
type inspector struct {
	plan *Plan
	sums [][sha256.Size]byte
	hash hash.Hash // of the tensor that is being read
}

func newInspector(p *Plan, sums [][sha256.Size]byte) *inspector {
	if !p.opts.Check && !p.opts.Hash {
		return nil
	}
	return &inspector{plan: p, sums: sums, hash: sha256.New()}
}

// see is given src, which begins at offset off of the bytes of a tensor in the file. With Options.Hash, the parts of a tensor
// must come to one inspector, in order.
func (in *inspector) see(tensor int, off int64, src []byte) error {
	if in == nil {
		return nil
	}
	t := &in.plan.Tensors[tensor]
	if in.plan.opts.Hash {
		if off == 0 {
			in.hash.Reset()
		}
		in.hash.Write(src)
		if off+int64(len(src)) == t.Size {
			in.hash.Sum(in.sums[tensor][:0])
		}
	}
	if in.plan.opts.Check {
		return checkValues(t, off, src)
	}
	return nil
}

// runs returns where the runs of chunks begin that one worker has to read in order, for the sake of the hashes: a run ends
// where a chunk begins with a tensor. See [Plan.cut].
func runs(chunks []chunk) []int {
	var starts []int
	for i := range chunks {
		if chunks[i].segs[0].src == 0 {
			starts = append(starts, i)
		}
	}
	return starts
}

// take returns the number of the chunk that the worker is to read next; there is none of that number when all are taken.
func (wk *worker) take() int {
	p := wk.p
	chunks := p.model.chunks
	if p.runs == nil {
		return int(p.next.Add(1)) - 1
	}
	if wk.after == wk.end { // begin another run
		i := int(p.next.Add(1)) - 1
		if i >= len(p.runs) {
			return len(chunks)
		}
		wk.after, wk.end = p.runs[i], len(chunks)
		if i+1 < len(p.runs) {
			wk.end = p.runs[i+1]
		}
	}
	wk.after++
	wk.read.ahead = chunks[wk.after:wk.end]
	return wk.after - 1
}
