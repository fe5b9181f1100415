package models

import (
	"context"
	"fmt"
	"os"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// openRegular opens a regular file again, by its descriptor, so that it can be mapped and read directly. It works for
// files that have no name any more, too.
func (o *Opener) openRegular(_ context.Context, f *os.File, _ string) (*gguf.File, error) {
	o.mu.Lock()
	o.open = append(o.open, f)
	o.mu.Unlock()
	return gguf.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}
