package measure_test

import (
	"context"
	"fmt"
	"log"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/measure"
)

// What the link to a device carries. With amdhip.Default in place of soft.Open it is that of a GPU.
func ExampleLink() {
	dev, err := soft.Open(soft.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Runtime().Close()
	speed, err := measure.Link(context.Background(), dev)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("link: %.1f GB/s\n", speed/1e9)
}

// How fast a model's file can be read from the disk, past the page cache, by eight at a time.
func ExampleRead() {
	file, err := gguf.Open("../../testdata/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	speed, err := measure.Read(context.Background(), file, 8, true)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("read something:", speed > 0)
	// Output: read something: true
}
