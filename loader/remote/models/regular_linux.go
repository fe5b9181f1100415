package models

import (
	"context"
	"fmt"
	"os"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// openRegular opens a regular file again, by its descriptor, so that it can be mapped and read directly. It works for
// files that have no name any more, too.
// One that is compared with a digest is read by ranges.
func (o *Opener) openRegular(ctx context.Context, f *os.File, name string) (*gguf.File, error) {
	if o.o.Remote.Expect != nil {
		return o.client.OpenFile(ctx, f, name)
	}
	o.mu.Lock()
	o.open = append(o.open, f)
	o.mu.Unlock()
	return gguf.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}
