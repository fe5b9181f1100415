package gguf_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

func ExampleOpen() {
	file, err := gguf.Open("../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()

	layers, _ := file.Metadata().Uint("llama.block_count")
	fmt.Println(file.Architecture(), "with", layers, "layers and", len(file.Tensors()), "tensors")

	tokens, _ := file.Metadata().Get("tokenizer.ggml.tokens")
	for i, token := range tokens.Strings() {
		if i == 3 {
			break
		}
		fmt.Printf("token %d is %q\n", i, token)
	}

	q, ok := file.Tensor("blk.0.attn_q.weight")
	if !ok {
		log.Fatal("no such tensor")
	}
	// Mapped memory is read inside Guard, so that a file that is truncated meanwhile is an error and not the end.
	err = file.Guard(func() error {
		fmt.Println(q.Type, q.Shape, len(file.Data(q)), "bytes")
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// llama with 4 layers and 40 tensors
	// token 0 is "<unk>"
	// token 1 is "<s>"
	// token 2 is "</s>"
	// Q4_K [256 256] 36864 bytes
}

func ExampleMetadata() {
	file, err := gguf.Open("../testdata/gguf/v2.gguf")
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()

	fmt.Print(file.Metadata())
	alignment, ok := file.Metadata().Uint("general.alignment")
	fmt.Println(alignment, ok)
	// Output:
	// general.architecture = "golden"
	// general.alignment = 32
	// general.name = "v2.gguf"
	// 32 true
}

func ExampleType() {
	var t gguf.Type
	if err := t.UnmarshalText([]byte("q4_k")); err != nil {
		log.Fatal(err)
	}
	n, _ := t.Bytes(4096)
	fmt.Println(t, "stores 4096 elements in", n, "bytes")

	t = 139 // a type that only a fork of ggml has
	fmt.Println(t, "of", t.Origin())
	fmt.Println(t.Err())
	// Output:
	// Q4_K stores 4096 elements in 2304 bytes
	// IQ4_K of ik_llama.cpp
	// unsupported: tensor type 139 is IQ4_K of ik_llama.cpp
}

// A model in memory, read through a Source.
func ExampleOpenSource() {
	data, err := os.ReadFile("../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	ctx := context.Background()
	file, err := gguf.OpenSource(ctx, "tiny-llama.gguf", func(_ context.Context, name string) (gguf.Source, error) {
		return inMemory{name, data}, nil
	})
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()

	norm, _ := file.Tensor("output_norm.weight")
	r := file.Range(ctx, norm, 0, norm.Size)
	defer r.Close()
	weights, err := io.ReadAll(r)
	fmt.Println(norm.Type, norm.Shape, len(weights), "bytes", err)
	// Output: F32 [256] 1024 bytes <nil>
}

type inMemory struct {
	name string
	data []byte
}

func (m inMemory) Path() string { return m.name }
func (m inMemory) Size() int64  { return int64(len(m.data)) }
func (m inMemory) Close() error { return nil }

func (m inMemory) Range(_ context.Context, off, n int64) io.ReadCloser {
	return io.NopCloser(bytes.NewReader(m.data[off : off+n]))
}

func ExampleFormatError() {
	_, err := gguf.Open("../testdata/gguf/tiny-llama-00001-of-00003.header")
	if fe, ok := errors.AsType[*gguf.FormatError](err); ok {
		fmt.Println("a part without the others:", errors.Is(err, gguf.ErrSplit))
		fmt.Println("key:", fe.Field)
	}
	// Output:
	// a part without the others: true
	// key: split.count
}

func ExampleWriter() {
	var file bytes.Buffer
	w := gguf.NewWriter(&file, gguf.WriterOptions{})
	w.Set("general.architecture", "example")
	w.Set("example.sizes", []uint32{2, 3, 5})
	w.AddTensor("bias", gguf.F32, 2)
	w.WriteHeader()
	w.WriteTensor("bias", []byte{0, 0, 128, 63, 0, 0, 0, 64}) // 1 and 2
	if err := w.Close(); err != nil {                         // any error of the calls above
		log.Fatal(err)
	}
	fmt.Println(file.Len(), "bytes")
	// Output: 192 bytes
}
