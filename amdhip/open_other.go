//go:build !linux || android

package amdhip

import (
	"fmt"
	"log/slog"
	"runtime"
)

// openLibrary fails: AMD's runtime is bound on Linux only.
func openLibrary(explicit string, _ *slog.Logger) (*library, error) {
	if explicit == "" {
		explicit = sonames[0]
	}
	err := fmt.Errorf("HIP is supported on Linux only, this is %s: %w", runtime.GOOS, ErrUnsupported)
	return nil, &LibraryError{Attempts: []Attempt{{Path: explicit, Source: "platform", Err: err}}}
}
