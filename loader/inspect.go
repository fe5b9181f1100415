package loader

import (
	"crypto/sha256"
	"hash"

	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// TensorHash is the SHA-256 of a tensor's bytes in the file.
type TensorHash struct {
	Name string
	Sum  [sha256.Size]byte
}

// Hashes returns the hashes that Request.Hash asked for, in file order, once the load has ended well; nil otherwise.
// They are those of the very bytes that were loaded, not of a second look at the file.
func (m *Model) Hashes() []TensorHash {
	select {
	case <-m.finished:
	default:
		return nil
	}
	if m.failure() != nil || m.parts[0].sums == nil {
		return nil
	}
	var all []TensorHash
	for _, t := range m.plan.Tensors() {
		group, i, _ := m.plan.Find(t.Name)
		all = append(all, TensorHash{t.Name, m.parts[group].sums[i]})
	}
	return all
}

// newSums returns the place for the tensors' hashes.
func newSums(g *plan.Group) [][sha256.Size]byte {
	sums := make([][sha256.Size]byte, len(g.Tensors))
	for i := range sums {
		sums[i] = sha256.Sum256(nil) // for tensors without elements, which nobody reads
	}
	return sums
}

// inspector looks at the file's bytes on their way, as Request.Check and Request.Hash ask. Nil does nothing. Each
// worker has its own.
type inspector struct {
	group   *plan.Group
	request Request
	sums    [][sha256.Size]byte
	hash    hash.Hash // of the tensor that is being read
}

func newInspector(g *plan.Group, r Request, sums [][sha256.Size]byte) *inspector {
	if !r.Check && !r.Hash {
		return nil
	}
	return &inspector{group: g, request: r, sums: sums, hash: sha256.New()}
}

// see is given src, which begins at offset off of the bytes of a tensor in the file. With Request.Hash, the parts of a
// tensor must come to one inspector, in order.
func (in *inspector) see(tensor int, off int64, src []byte) error {
	if in == nil {
		return nil
	}
	t := &in.group.Tensors[tensor]
	if in.request.Hash {
		if off == 0 {
			in.hash.Reset()
		}
		in.hash.Write(src)
		if off+int64(len(src)) == t.Size {
			in.hash.Sum(in.sums[tensor][:0])
		}
	}
	if in.request.Check {
		return checkValues(t, off, src)
	}
	return nil
}

// hashRuns returns where the runs of chunks begin that one worker has to read in order, for the sake of the hashes: a
// run ends where a chunk begins with a tensor. See [plan.CutOptions.Ordered].
func hashRuns(chunks []plan.Chunk) []int {
	var starts []int
	for i := range chunks {
		if chunks[i].Segs[0].Src == 0 {
			starts = append(starts, i)
		}
	}
	return starts
}
