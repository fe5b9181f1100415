package hold

import (
	"errors"

	"github.com/gguf2gpu/gguf2gpu/loader"
)

// leftovers sums up what several calls of Close have left, and collects their other errors.
type leftovers struct {
	loader.LeftError
	others []error
}

func (l *leftovers) add(err error) {
	if all, ok := errors.AsType[interface {
		error
		Unwrap() []error
	}](err); ok {
		for _, err := range all.Unwrap() {
			l.add(err)
		}
		return
	}
	if e, ok := errors.AsType[*loader.LeftError](err); ok {
		l.DeviceBytes += e.DeviceBytes
		l.HostBytes += e.HostBytes
		l.Streams += e.Streams
		l.Kernels += e.Kernels
		return
	}
	l.others = append(l.others, err)
}

func (l *leftovers) err() error {
	if l.LeftError != (loader.LeftError{}) {
		l.others = append(l.others, &l.LeftError)
	}
	return errors.Join(l.others...)
}
