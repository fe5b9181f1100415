package models_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
)

func Example() {
	o := models.New(models.Options{Stdin: os.Stdin})
	defer o.Close()
	file, err := o.Open(context.Background(), "../../../testdata/tiny-llama.gguf") // or "hf:ORG/REPO:Q4_K_M", "-", …
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	fmt.Println(file.Architecture(), models.IsPath("hf:ORG/REPO"))
	// Output: llama false
}
