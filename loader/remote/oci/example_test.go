package oci_test

import (
	"fmt"
	"log"

	"github.com/gguf2gpu/gguf2gpu/loader/remote/oci"
)

func ExampleParse() {
	n, err := oci.Parse("oci://ghcr.io/o/m:q4")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(n.Registry, n.Repository, n.Reference)
	// Output: ghcr.io o/m q4
}
