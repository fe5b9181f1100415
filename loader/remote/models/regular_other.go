//go:build !linux

package models

import (
	"context"
	"os"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
)

// openRegular opens a regular file by its descriptor, and reads it by ranges.
func (*Opener) openRegular(ctx context.Context, f *os.File, name string) (*gguf.File, error) {
	return remote.OpenFile(ctx, f, name)
}
