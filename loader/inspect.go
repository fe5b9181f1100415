package loader

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"slices"
	"strings"

	"lukechampine.com/blake3"

	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// HashAlgorithm is how tensors are hashed.
type HashAlgorithm uint8

const (
	// SHA256 takes the bytes of a tensor in order, so that one worker hashes all of it.
	SHA256 HashAlgorithm = iota
	// BLAKE3 is a tree: all workers hash parts of a tensor at the same time.
	BLAKE3
)

var hashNames = []string{SHA256: "sha256", BLAKE3: "blake3"}

// String returns "sha256" or "blake3".
func (a HashAlgorithm) String() string {
	if int(a) < len(hashNames) {
		return hashNames[a]
	}
	return fmt.Sprintf("HashAlgorithm(%d)", uint8(a))
}

// UnmarshalText reads what String returns, in upper or lower case.
func (a *HashAlgorithm) UnmarshalText(text []byte) error {
	i := slices.Index(hashNames, strings.ToLower(string(text)))
	if i < 0 {
		return fmt.Errorf("loader: %.100q is no hash: use %s", text, strings.Join(hashNames, " or "))
	}
	*a = HashAlgorithm(i)
	return nil
}

// HashSize is the number of bytes of a hash, of either algorithm.
const HashSize = sha256.Size

// TensorHash is the hash of a tensor's bytes in the file.
type TensorHash struct {
	Name string
	Sum  [HashSize]byte
}

// Hashes returns the hashes that Request.Hash asked for, in file order, once the load has ended well; nil otherwise.
// They are those of the very bytes that were loaded, not of a second look at the file.
func (m *Model) Hashes() []TensorHash {
	select {
	case <-m.finished:
	default:
		return nil
	}
	if m.failure() != nil || m.parts[0].hashes == nil {
		return nil
	}
	var all []TensorHash
	for _, t := range m.plan.Tensors() {
		group, i, _ := m.plan.Find(t.Name)
		all = append(all, TensorHash{t.Name, m.parts[group].hashes.sums[i]})
	}
	return all
}

// hashes are those of the tensors of a group.
type hashes struct {
	sums  [][HashSize]byte
	trees []*treeHash // with BLAKE3; nil for tensors without bytes, which nobody reads
}

// newHashes returns what r asks for; nil for nothing.
func newHashes(g *plan.Group, r Request) *hashes {
	if !r.Hash {
		return nil
	}
	h := &hashes{sums: make([][HashSize]byte, len(g.Tensors))}
	if r.HashWith == BLAKE3 {
		h.trees = make([]*treeHash, len(g.Tensors))
	}
	for i := range g.Tensors {
		switch size := g.Tensors[i].Size; {
		case h.trees == nil:
			h.sums[i] = sha256.Sum256(nil) // for tensors without bytes
		case size == 0:
			h.sums[i] = blake3.Sum256(nil)
		default:
			h.trees[i] = newTreeHash(size, &h.sums[i])
		}
	}
	return h
}

// hashInOrder reports whether the bytes of a tensor have to come to one worker, in order.
func (r *Request) hashInOrder() bool { return r.Hash && r.HashWith != BLAKE3 }

// inspector looks at the file's bytes on their way, as Request.Check and Request.Hash ask. Nil does nothing. Each
// worker has its own.
type inspector struct {
	group   *plan.Group
	request Request
	hashes  *hashes   // of all inspectors of the group
	hash    hash.Hash // of the tensor that is being read in order
}

func newInspector(g *plan.Group, r Request, h *hashes) *inspector {
	if !r.Check && !r.Hash {
		return nil
	}
	return &inspector{group: g, request: r, hashes: h, hash: sha256.New()}
}

// see is given src, which begins at offset off of the bytes of a tensor in the file. If the request hashes in order,
// the parts of a tensor must come to one inspector, in order.
func (in *inspector) see(tensor int, off int64, src []byte) error {
	if in == nil {
		return nil
	}
	t := &in.group.Tensors[tensor]
	switch {
	case in.request.hashInOrder():
		if off == 0 {
			in.hash.Reset()
		}
		in.hash.Write(src)
		if off+int64(len(src)) == t.Size {
			in.hash.Sum(in.hashes.sums[tensor][:0])
		}
	case in.request.Hash && len(src) > 0:
		in.hashes.trees[tensor].add(off, src)
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
