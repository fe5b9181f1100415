package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"strconv"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/term"
)

// maxArray is the largest length of a metadata array that --json shows in full without --full. Of longer ones, such as
// vocabularies with 10^5 entries, it shows type, length and the first elements.
const maxArray = 16

// firstElements is how many those are.
const firstElements = 5

// partReport, tensorReport and what printJSON writes are the JSON of inspect. Sizes are in bytes; fields are part of
// the command's contract.
type partReport struct {
	Path       string `json:"path"`
	Version    uint32 `json:"version"`
	Bytes      int64  `json:"bytes"`
	Alignment  uint32 `json:"alignment"`
	DataOffset int64  `json:"data_offset"`
	Tensors    int    `json:"tensors"`
}

type tensorReport struct {
	Name   string   `json:"name"`
	Type   string   `json:"type"`
	Shape  []uint64 `json:"shape"` // ggml's order: the first dimension is the contiguous one
	Part   int      `json:"part"`
	Offset int64    `json:"offset"` // in the part's file
	Bytes  int64    `json:"bytes"`  // -1: not known
}

// printJSON writes the report as one JSON object, piece by piece. If the file cannot be read to its end, the object
// ends with the error.
func (o *inspection) printJSON(to io.Writer, path string) error {
	s := newJSONStream(to)
	if err := o.model.Guard(func() error { o.writeJSON(s, path); return nil }); err != nil {
		s.fail(failure{Error: err.Error(), Code: codeOf(o.ctx, err)})
		return errors.Join(&reportedError{err}, s.flush())
	}
	return s.flush()
}

// reportedError is an error that --json has already reported.
type reportedError struct{ error }

func (e *reportedError) Unwrap() error { return e.error }

func (o *inspection) writeJSON(s *jsonStream, path string) {
	m, sum := o.model, total(o.model)
	s.open('{')
	s.member("model", path)
	s.key("architecture")
	s.text(m.Architecture())
	s.member("file_bytes", m.Size())
	s.member("elements", sum.elements) // of all tensors together: the number of parameters
	s.member("quantization", o.quantization(sum))
	s.member("bits_per_weight", sum.bitsPerWeight())
	s.member("hyperparameters", o.shape())
	s.key("parts")
	s.open('[')
	for i, p := range m.Parts() {
		s.value(partReport{p.Path, p.Version, p.Size, p.Alignment, p.DataOffset, sum.partTensors[i]})
	}
	s.close()
	s.key("metadata")
	s.open('{')
	for key, v := range m.Metadata().All() {
		if o.showsKey(key) {
			s.key(key)
			s.metadata(v, *o.full)
		}
	}
	s.close()
	s.member("types", sum.types)
	s.member("device_bytes", sum.deviceBytes)
	s.key("tensors")
	s.open('[')
	for i := range m.Tensors() {
		if t := &m.Tensors()[i]; o.listsTensor(t) {
			s.value(tensorReport{t.Name, t.Type.String(), append([]uint64{}, t.Shape...), t.Part, t.Offset, t.Size})
		}
	}
	s.close()
	s.close()
}

// metadata writes a metadata value. Numbers that JSON does not have become strings.
func (s *jsonStream) metadata(v gguf.Value, full bool) {
	elem, isArray := v.ElemKind()
	if !isArray {
		for e := range elements(v) {
			s.element(e, full)
		}
		return
	}
	most := v.Len()
	long := most > maxArray && !full
	if long {
		most = firstElements
		s.open('{')
		s.member("type", elem.String())
		s.member("length", v.Len())
		s.key("first")
	}
	s.open('[')
	for e := range elements(v) {
		if most == 0 {
			break
		}
		most--
		s.element(e, full)
	}
	s.close()
	if long {
		s.close()
	}
}

func (s *jsonStream) element(e element, full bool) {
	switch {
	case e.isText:
		s.text(e.text)
	case e.isArray:
		s.metadata(e.array, full)
	default:
		s.literal([]byte(e.text))
	}
}

// element is a metadata value or an element of an array: a text, an array, or a number or bool as JSON writes it.
type element struct {
	text            string
	isText, isArray bool
	array           gguf.Value
}

// elements returns the elements of an array, or a value that is none as the only element.
func elements(v gguf.Value) iter.Seq[element] {
	return func(yield func(element) bool) {
		elem, isArray := v.ElemKind()
		if !isArray {
			yield(scalarElement(v))
			return
		}
		switch elem {
		case gguf.KindString:
			each(v.Strings(), yield, func(t string) element { return element{text: t, isText: true} })
		case gguf.KindArray:
			each(v.Arrays(), yield, func(a gguf.Value) element { return element{array: a, isArray: true} })
		case gguf.KindBool:
			each(v.Bools(), yield, func(b bool) element { return element{text: strconv.FormatBool(b)} })
		case gguf.KindFloat32, gguf.KindFloat64:
			each(v.Floats(), yield, func(f float64) element { return element{text: floatText(f, elem)} })
		case gguf.KindUint64:
			each(v.Uints(), yield, func(u uint64) element { return element{text: strconv.FormatUint(u, 10)} })
		default:
			each(v.Ints(), yield, func(i int64) element { return element{text: strconv.FormatInt(i, 10)} })
		}
	}
}

func each[T any](all iter.Seq2[int, T], yield func(element) bool, convert func(T) element) {
	for _, x := range all {
		if !yield(convert(x)) {
			return
		}
	}
}

func scalarElement(v gguf.Value) element {
	if t, ok := v.Text(); ok {
		return element{text: t, isText: true}
	}
	if f, ok := v.Float(); ok {
		return element{text: floatText(f, v.Kind())}
	}
	return element{text: v.String()} // an integer or a bool
}

// floatText returns a number with as many digits as its kind has. What JSON does not have is in quotes.
func floatText(f float64, kind gguf.ValueKind) string {
	var value any = f
	switch {
	case math.IsNaN(f) || math.IsInf(f, 0):
		value = fmt.Sprint(f)
	case kind == gguf.KindFloat32:
		value = float32(f)
	}
	text, _ := json.Marshal(value) // it has no values that can fail
	return string(text)
}

// maxPiece is how many bytes of a text are converted at once.
const maxPiece = 32 << 10

// pieces cuts a text into short ones, between characters.
func pieces(text string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for text != "" {
			piece := term.Cut(text, maxPiece)
			if !yield(piece) {
				return
			}
			text = text[len(piece):]
		}
	}
}
