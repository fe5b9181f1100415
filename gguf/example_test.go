package gguf_test

import (
	"bytes"
	"errors"
	"fmt"
	"log"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

func ExampleOpen() {
	model, err := gguf.Open("../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	defer model.Close()

	layers, _ := model.Metadata().Uint("llama.block_count")
	fmt.Println(model.Architecture(), "with", layers, "layers and", len(model.Tensors()), "tensors")

	tokens, _ := model.Metadata().Get("tokenizer.ggml.tokens")
	for i, token := range tokens.Strings() {
		if i == 3 {
			break
		}
		fmt.Printf("token %d is %q\n", i, token)
	}

	q, ok := model.Tensor("blk.0.attn_q.weight")
	if !ok {
		log.Fatal("no such tensor")
	}
	// Mapped memory is read inside Guard, so that a file that is truncated meanwhile is an error and not the end.
	err = model.Guard(func() error {
		fmt.Println(q.Type, q.Shape, len(model.Data(q)), "bytes")
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
