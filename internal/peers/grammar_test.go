package peers

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// token is a piece of a file that the grammar makes: a number, or bytes.
type token struct {
	role  role
	bytes []byte
}

// role says what a token is. Mutations change tokens by their role, so that they reach rules behind the first one.
type role int

const (
	other role = iota // magic, padding, data
	version
	count // of keys, tensors, elements, dimensions
	length
	text
	kind // of a value
	scalar
	dimension
	tensorType
	offset
	begin // of a key or a tensor: no bytes
)

// grammar makes files, and breaks them.
type grammar struct {
	rng    *rand.Rand
	tokens []token
	size   int
}

func (g *grammar) add(r role, b []byte) {
	g.tokens = append(g.tokens, token{r, b})
	g.size += len(b)
}

func (g *grammar) u32(r role, n uint32) { g.add(r, binary.LittleEndian.AppendUint32(nil, n)) }
func (g *grammar) u64(r role, n uint64) { g.add(r, binary.LittleEndian.AppendUint64(nil, n)) }

func (g *grammar) str(s string) {
	g.u64(length, uint64(len(s)))
	g.add(text, []byte(s))
}

// one reports whether something that is to happen once in n times happens now.
func (g *grammar) one(n int) bool { return g.rng.IntN(n) == 0 }

// word is a text.
func (g *grammar) word() string {
	words := []string{"", "a", "llama", "general.name", "ü", "漢字", "\x1b[31m", strings.Repeat("long ", 30), "tokenizer.ggml.tokens"}
	return words[g.rng.IntN(len(words))]
}

// sizes are those of the kinds of values, 0: a text or an array.
var sizes = []int{1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8}

// value adds a value of a kind.
func (g *grammar) value(k gguf.ValueKind, depth int) {
	switch k {
	case gguf.KindString:
		g.str(g.word())
	case gguf.KindArray:
		elem := gguf.ValueKind(g.rng.IntN(len(sizes)))
		if elem == gguf.KindArray && depth == 0 {
			elem = gguf.KindUint8
		}
		n := g.rng.IntN(5)
		g.u32(kind, uint32(elem))
		g.u64(count, uint64(n))
		for range n {
			g.value(elem, depth-1)
		}
	case gguf.KindBool:
		g.add(scalar, []byte{byte(g.rng.IntN(2))})
	default:
		b := make([]byte, sizes[k])
		for i := range b {
			b[i] = byte(g.rng.Uint32())
		}
		g.add(scalar, b)
	}
}

// file makes a sound file.
func (g *grammar) file() {
	g.tokens, g.size = g.tokens[:0], 0
	keys, tensors := g.rng.IntN(6), g.rng.IntN(5)
	align := 32
	aligned := g.one(3)
	g.add(other, []byte("GGUF"))
	g.u32(version, 2+uint32(g.rng.IntN(2)))
	g.u64(count, uint64(tensors))
	if aligned {
		g.u64(count, uint64(keys+1))
		align = 1 << g.rng.IntN(13)
		g.add(begin, nil)
		g.str("general.alignment")
		g.u32(kind, uint32(gguf.KindUint32))
		g.u32(scalar, uint32(align))
	} else {
		g.u64(count, uint64(keys))
	}
	for i := range keys {
		g.add(begin, nil)
		g.str(strings.Repeat("k", i+1) + "." + g.word())
		k := gguf.ValueKind(g.rng.IntN(len(sizes)))
		g.u32(kind, uint32(k))
		g.value(k, 1)
	}
	at := 0
	types := slices.DeleteFunc(gguf.Types(), func(t gguf.Type) bool { return t == gguf.Q8_1 }) // see hasQ81
	for i := range tensors {
		typ := types[g.rng.IntN(len(types))]
		dims := make([]uint64, 1+g.rng.IntN(4))
		elems := typ.BlockElems()
		for d := range dims {
			dims[d] = uint64(1 + g.rng.IntN(3))
			elems *= int(dims[d])
		}
		dims[0] *= uint64(typ.BlockElems())
		g.add(begin, nil)
		g.str(strings.Repeat("t", i+1) + "." + g.word())
		g.u32(count, uint32(len(dims)))
		for _, n := range dims {
			g.u64(dimension, n)
		}
		g.u32(tensorType, uint32(typ))
		g.u64(offset, uint64(at))
		at += (elems/typ.BlockElems()*typ.BlockBytes() + align - 1) / align * align
	}
	g.add(other, make([]byte, (align-g.size%align)%align))
	data := make([]byte, at)
	for i := range data {
		data[i] = byte(i)
	}
	g.add(other, data)
}

// mutate changes one token or more, and returns what it did to which role.
func (g *grammar) mutate() {
	i := g.rng.IntN(len(g.tokens))
	x := &g.tokens[i]
	switch n := g.rng.IntN(12); {
	case n < 8 && (len(x.bytes) == 4 || len(x.bytes) == 8) && x.role != text && x.role != other:
		b := slices.Clone(x.bytes)
		old := uint64(binary.LittleEndian.Uint32(b))
		if len(b) == 8 {
			old = binary.LittleEndian.Uint64(b)
		}
		odd := []uint64{
			0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 64, 255, 256, 1 << 16, 1 << 24, 1<<31 - 1, 1 << 31,
			1<<32 - 1, 1 << 32, 1 << 62, 1<<63 - 1, 1 << 63, math.MaxUint64, old + 1, old - 1, old * 2, old / 2, old + 32,
		}
		v := odd[g.rng.IntN(len(odd))]
		if len(b) == 8 {
			binary.LittleEndian.PutUint64(b, v)
		} else {
			binary.LittleEndian.PutUint32(b, uint32(v))
		}
		x.bytes = b
	case n < 8 && len(x.bytes) > 0:
		b := slices.Clone(x.bytes)
		b[g.rng.IntN(len(b))] = []byte{0, 1, 2, 0x7f, 0x80, 0xff, 'a'}[g.rng.IntN(7)]
		x.bytes = b
	case n == 8: // the file ends here
		g.tokens = g.tokens[:i+1]
		if len(x.bytes) > 0 {
			x.bytes = x.bytes[:g.rng.IntN(len(x.bytes)+1)]
		}
	case n == 9: // something is there twice, or not at all
		if g.one(2) {
			g.tokens = slices.Insert(g.tokens, i, g.tokens[i:g.next(i)]...)
		} else {
			g.tokens = slices.Delete(g.tokens, i, g.next(i))
		}
	case n == 10:
		j := g.rng.IntN(len(g.tokens))
		g.tokens[i], g.tokens[j] = g.tokens[j], g.tokens[i]
	default:
		g.tokens = append(g.tokens, token{other, make([]byte, g.rng.IntN(100))})
	}
	if len(g.tokens) == 0 {
		g.tokens = append(g.tokens, token{})
	}
}

// next is where the record ends that begins at i; for other tokens it is the one behind.
func (g *grammar) next(i int) int {
	if g.tokens[i].role != begin {
		return i + 1
	}
	for j := i + 1; j < len(g.tokens); j++ {
		if g.tokens[j].role == begin {
			return j
		}
	}
	return i + 1
}

// mutant returns a file that may be anything: one in five is sound.
func (g *grammar) mutant() []byte {
	g.file()
	if !g.one(5) {
		for range 1 + g.rng.IntN(3) {
			g.mutate()
		}
	}
	var b []byte
	for _, x := range g.tokens {
		b = append(b, x.bytes...)
	}
	return b
}
