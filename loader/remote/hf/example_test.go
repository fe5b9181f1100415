package hf_test

import (
	"fmt"
	"log"

	"github.com/gguf2gpu/gguf2gpu/loader/remote/hf"
)

func ExampleParse() {
	n, err := hf.Parse("hf:ORG/REPO@v1:Q8_0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(n.Repo, n.Revision, n.Quant)
	// Output: ORG/REPO v1 Q8_0
}
