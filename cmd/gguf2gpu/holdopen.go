package main

import (
	"context"
	"errors"
	"slices"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader/remote"
	"github.com/gguf2gpu/gguf2gpu/loader/remote/models"
)

// heldOpener opens models that are held: those that other processes name, too, whose streams are not this process's.
type heldOpener struct {
	*models.Opener
	streams   []string       // models that this process was told to hold: these may be streams
	expecting *models.Opener // opens the model elsewhere of which something is expected; nil: there is none
	expected  string         // its name
}

// Opens reports whether a name is for it.
func (o heldOpener) Opens(name string) bool {
	return o.expecting != nil && name == o.expected ||
		o.Opener.Opens(name) && (!models.IsStream(name) || slices.Contains(o.streams, name))
}

// Open opens a model.
func (o heldOpener) Open(ctx context.Context, name string) (*gguf.File, error) {
	if o.expecting != nil && name == o.expected {
		return o.expecting.Open(ctx, name)
	}
	return o.Opener.Open(ctx, name)
}

// checkFiles compares the files of a model on a disk with what is expected of them. A holder does so before it opens
// them as files: only these can be found again by who attaches.
func checkFiles(ctx context.Context, o *models.Opener, path string) error {
	m, err := o.Open(ctx, path)
	if err != nil {
		return err
	}
	return errors.Join(m.Check(ctx, true), m.Close())
}

// firstAddress is the first of names that is an address, for which a token may be; "" if none is.
func firstAddress(names []string) string {
	for _, name := range names {
		if remote.IsAddress(name) {
			return name
		}
	}
	return ""
}
