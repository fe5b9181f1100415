package s3_test

import (
	"fmt"
	"log"

	"github.com/gguf2gpu/gguf2gpu/loader/remote/s3"
)

func ExampleParse() {
	n, err := s3.Parse("s3://models/a/m.gguf")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(n.Bucket, n.Key)
	// Output: models a/m.gguf
}
