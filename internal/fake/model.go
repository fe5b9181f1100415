package fake

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Model returns a small model of one tensor of so many bytes, which are different for each seed.
func Model(seed byte, size int) []byte { return part(seed, size, 0, 1) }

// Split returns the parts of a model, each with one tensor, by their names: NAME-00001-of-0000N.gguf.
func Split(name string, n, size int) map[string][]byte {
	all := make(map[string][]byte, n)
	for i := range n {
		all[fmt.Sprintf("%s-%05d-of-%05d.gguf", name, i+1, n)] = part(byte(i), size, i, n)
	}
	return all
}

func part(seed byte, size, no, count int) []byte {
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i*7) ^ byte(i>>8) + seed
	}
	var b bytes.Buffer
	w := gguf.NewWriter(&b, gguf.WriterOptions{})
	err := w.Set("general.architecture", "llama")
	if count > 1 {
		err = errors.Join(err, w.Set("split.no", uint16(no)), w.Set("split.count", uint16(count)))
	}
	name := fmt.Sprint("t", no)
	err = errors.Join(err, w.AddTensor(name, gguf.I8, uint64(size)), w.WriteHeader(), w.WriteTensor(name, data), w.Close())
	if err != nil {
		panic(err) // a buffer does not fail
	}
	return b.Bytes()
}
