package synth_test

import (
	"bytes"
	"context"
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/synth"
)

func ExampleModel_Write() {
	m := synth.Model{Preset: synth.Tiny, Types: synth.Q4KM, Seed: 1}
	var file bytes.Buffer
	n, err := m.Write(context.Background(), &file, nil)
	fmt.Println(n, err)
	first := m.Tensors()[0]
	fmt.Println(first.Name, first.Type, first.Shape)
	// Output:
	// 905312 <nil>
	// token_embd.weight Q4_K [256 512]
}
