package rank_test

import (
	"errors"
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/loader/rank"
)

// A process that torchrun has started as one of 32 on four hosts. A real program gives os.Getenv.
func ExampleDetect() {
	environment := map[string]string{
		"TORCHELASTIC_RUN_ID": "none", "RANK": "29", "WORLD_SIZE": "32", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8",
	}
	getenv := func(name string) string { return environment[name] }

	r, err := rank.Detect(getenv)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%s: rank %d of %d, %d of %d on this host\n", r.Source, r.Rank, r.World, r.Local, r.LocalWorld)

	gpu, _ := rank.Device(r.Local, 8, getenv)
	fmt.Println("GPU", gpu)
	// Output:
	// torchrun: rank 29 of 32, 5 of 8 on this host
	// GPU 5
}

// A program that may also run alone.
func ExampleDetect_alone() {
	r, err := rank.Detect(func(string) string { return "" })
	if errors.Is(err, rank.ErrUnknown) {
		r, err = rank.Rank{Rank: 0, World: 1, Local: -1}, nil
	}
	fmt.Println(r.Rank, r.World, err)
	// Output: 0 1 <nil>
}
