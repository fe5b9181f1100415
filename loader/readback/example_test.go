package readback_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/loader/readback"
)

// loaded puts a small model on a software device.
func loaded(ctx context.Context) (file *gguf.File, model *loader.Model, done func()) {
	file, err := gguf.Open("../../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	dev, err := soft.Open(soft.Options{})
	if err != nil {
		log.Fatal(err)
	}
	model, err = loader.Load(ctx, file, plan.Spec{Policy: plan.F16}, dev)
	if err != nil {
		log.Fatal(err)
	}
	return file, model, func() {
		if err := errors.Join(model.Close(), dev.Runtime().Close(), file.Close()); err != nil {
			log.Fatal(err)
		}
	}
}

// Compare a model in device memory with its file.
func ExampleVerify() {
	ctx := context.Background()
	file, model, done := loaded(ctx)
	defer done()
	result, err := readback.Verify(ctx, model, file)
	if e, ok := errors.AsType[*readback.MismatchError](err); ok {
		log.Fatalf("tensor %s is wrong from byte %d on", e.Tensor, e.Offset)
	}
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("verified:", result)
	// Output: verified: 40 of 40 tensors
}

// Look at one tensor as the device has it.
func ExampleTensor() {
	ctx := context.Background()
	_, model, done := loaded(ctx)
	defer done()
	b, err := readback.Tensor(ctx, model, "output_norm.weight")
	if err != nil {
		log.Fatal(err)
	}
	t, err := model.Tensor("output_norm.weight")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(b), "bytes of", t.Type, t.Shape)
	// Output: 512 bytes of F16 [256]
}

// Write what is in device memory into a file that other programs read.
func ExampleWriteSafetensors() {
	ctx := context.Background()
	_, model, done := loaded(ctx)
	defer done()
	dir, err := os.MkdirTemp("", "readback")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	out, err := os.Create(filepath.Join(dir, "model.safetensors"))
	if err != nil {
		log.Fatal(err)
	}
	if err := errors.Join(readback.WriteSafetensors(ctx, model, out), out.Close()); err != nil {
		log.Fatal(err)
	}
	b, err := os.ReadFile(out.Name())
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(b[8:bytes.IndexByte(b, ',')]))
	// Output: {"__metadata__":{"format":"pt"}
}
