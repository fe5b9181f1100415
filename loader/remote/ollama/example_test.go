package ollama_test

import (
	"fmt"
	"log"

	"github.com/gguf2gpu/gguf2gpu/loader/remote/ollama"
)

func ExampleParse() {
	n, err := ollama.Parse("ollama:llama3.2")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(n.Host, n.Namespace, n.Model, n.Tag)
	// Output: registry.ollama.ai library llama3.2 latest
}
