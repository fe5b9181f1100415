//go:build !linux

package models

import (
	"context"
	"os"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// openRegular opens a regular file by its descriptor, and reads it by ranges.
func (o *Opener) openRegular(ctx context.Context, f *os.File, name string) (*gguf.File, error) {
	return o.client.OpenFile(ctx, f, name)
}
