package hold_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
	"github.com/gguf2gpu/gguf2gpu/loader/hold"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// One process holds a model, and another one attaches to it. Here both are in one process, each with a software device
// of its own; on GPUs they must be two.
func Example() {
	dir, err := os.MkdirTemp("", "hold")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "models.sock")

	// The process that holds.
	dev, err := soft.Open(soft.Options{Shared: true})
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Runtime().Close()
	h, err := hold.New([]*amdhip.Device{dev}, hold.Options{Spec: plan.Spec{Policy: plan.F16}})
	if err != nil {
		log.Fatal(err)
	}
	defer h.Close()
	l, remove, err := hold.Listen(socket, false)
	if err != nil {
		log.Fatal(err)
	}
	defer remove()
	serving, stop := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- h.Serve(serving, l, time.Second) }()
	if _, err := h.Add(serving, "", "../../testdata/tiny-llama.gguf"); err != nil {
		log.Fatal(err)
	}

	// The other process.
	ctx := context.Background()
	model, err := hold.Attach(ctx, hold.AttachOptions{
		Socket: socket,
		Open: func(kind string, count int) (*amdhip.Runtime, error) { // GPUs need no Open
			return soft.OpenRuntime(soft.Options{Devices: count, Shared: true})
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := model.Wait(ctx, "output.weight"); err != nil { // the model may still be on its way
		log.Fatal(err)
	}
	t, err := model.Tensor("output.weight")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(model.Info.Name, t.Type, t.Shape, t.Ptr != 0)
	if err := model.Close(); err != nil {
		log.Fatal(err)
	}

	stop()
	fmt.Println("served:", <-served)
	// Output:
	// tiny-llama F16 [256 320] true
	// served: <nil>
}
