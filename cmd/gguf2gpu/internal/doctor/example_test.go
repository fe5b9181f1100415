package doctor_test

import (
	"fmt"

	"github.com/gguf2gpu/gguf2gpu/cmd/gguf2gpu/internal/doctor"
)

// What to do where no GPU is usable. There is no output to compare with, since it depends on the machine.
func ExampleCheck() {
	r := doctor.Check()
	for _, gpu := range r.Devices {
		fmt.Println(gpu.Index, gpu.Name)
	}
	for _, advice := range r.Advice {
		fmt.Println(advice)
	}
}
