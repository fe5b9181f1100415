package gguf

import (
	"os"
	"sync"
)

// descriptor is the file of a part, opened when File is first called.
type descriptor struct {
	once sync.Once
	file *os.File
}

// File returns the part's open file, nil for a part that is read from a [Source] or cannot be opened any more. It is
// closed by [File.Close].
//
// Deprecated: it keeps a descriptor for each part. Use [Part.Open] and [Part.Info].
func (p *Part) File() *os.File {
	if p.descriptor == nil {
		return nil
	}
	p.descriptor.once.Do(func() { p.descriptor.file, _ = p.Open(0) })
	return p.descriptor.file
}

func (p *Part) closeDescriptor() error {
	if p.descriptor == nil {
		return nil
	}
	p.descriptor.once.Do(func() {})
	if p.descriptor.file == nil {
		return nil
	}
	return p.descriptor.file.Close()
}
