package stream_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/gguf2gpu/gguf2gpu/loader/remote/stream"
)

func ExampleOpen() {
	pipe, err := os.Open("../../../testdata/tiny-llama.gguf") // such as os.Stdin
	if err != nil {
		log.Fatal(err)
	}
	file, err := stream.Open(context.Background(), pipe, "-")
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	fmt.Println(file.Architecture(), "once:", file.Reading().Once)
	// Output: llama once: true
}
