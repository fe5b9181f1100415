package remote_test

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"

	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

func Example() {
	server := httptest.NewServer(http.FileServer(http.Dir("../../testdata")))
	defer server.Close()

	// A token is given together with the host that it is for, and goes nowhere else.
	c := remote.NewClient(remote.Options{Tokens: map[string]string{"huggingface.co": "hf_…"}})
	defer c.Close()
	file, err := c.Open(context.Background(), server.URL+"/tiny-llama.gguf")
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()

	fmt.Println(file.Architecture(), "with", len(file.Tensors()), "tensors")
	fmt.Println("requests:", c.Stats().Requests)
	// Output:
	// llama with 40 tensors
	// requests: 1
}

func ExampleHost() {
	// A token for whatever host the user names first, and for no other.
	address := "https://models.example.com:8443/model.gguf"
	o := remote.Options{Tokens: map[string]string{remote.Host(address): "secret"}}
	fmt.Println(len(o.Tokens), remote.Host(address))
	// Output: 1 models.example.com:8443
}
