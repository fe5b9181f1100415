package loader

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// The protocol between a Holder and those who use its models, version 1.
//
// Both sides send messages over a Unix stream socket: four bytes with the length, big-endian, then that many bytes of JSON, an
// object. A client sends one request, a [request], of at most 64 KiB, within 10 seconds; what answers it, each a [reply] of at most
// 64 MiB, depends on the operation:
//
//   - "list": one reply with the models.
//   - "add": one reply with the models, once the new one's memory is there and it is being loaded, or with the error that
//     prevented it. The path must be absolute. Only the Holder's own user may ask for it.
//   - "drop": one reply with the other models, once the model's memory is free, or with an error. Only the Holder's own user.
//   - "attach": a reply with the manifest, how many tensors have arrived, and whether all have; if not, one more reply whenever
//     more have, and a last one with loaded or an error. Tensors arrive in the manifest's order. The connection stays open as long
//     as the client uses the memory: its end is how either side notices that of the other. The client says nothing more; it
//     unmaps the memory before it closes the connection.
//
// The Holder ends a connection on anything else. What one side does not know in a message of the other it ignores, so fields can
// be added. A change that this does not allow for makes a new version; a Holder refuses requests of versions that it does not
// know, by number.

// wireVersion is the version of the protocol.
const wireVersion = 1

const (
	// maxRequest bounds what a Holder reads from anybody.
	maxRequest = 64 << 10
	// maxReply bounds what a client reads from a Holder: the manifest of a model with some 300,000 tensors.
	maxReply = 64 << 20
)

// request is what a client asks for.
type request struct {
	Version int    `json:"version"`
	Op      string `json:"op"`              // "list", "add", "drop" or "attach"
	Model   string `json:"model,omitempty"` // name, "" for the only one; of add: path of the file

	// Of add: as the flags of load say it. What is missing is as the Holder's own options are.

	Name    string   `json:"name,omitempty"`
	DType   string   `json:"dtype,omitempty"`
	Rules   []string `json:"rules,omitempty"`
	Tensors string   `json:"tensors,omitempty"`
}

// reply is what a Holder answers. An error says why there is nothing else.
type reply struct {
	Version  int         `json:"version"`
	Error    string      `json:"error,omitempty"`
	Kind     string      `json:"kind,omitempty"`     // of the error, see wireErrors
	Manifest *manifest   `json:"manifest,omitempty"` // first answer to attach
	Ready    int         `json:"ready,omitempty"`    // so many tensors, from the first on, have arrived
	Loaded   bool        `json:"loaded,omitempty"`   // all have
	Models   []HeldModel `json:"models,omitempty"`
}

// wireErrors are the errors that a client gets to know by kind, so that errors.Is works on its side. The first that matches is it.
var wireErrors = []struct {
	kind string
	err  error
}{
	{"unknown", ErrUnknownModel},
	{"exists", ErrModelExists},
	{"attached", ErrAttached},
	{"memory", ErrInsufficientMemory},
	{"model", ErrBadModel},
	{"option", ErrBadOption},
	{"closing", ErrClosed},
}

// ErrBadModel is matched by what a Holder answers when the file that it shall add is damaged, hostile or of another format.
var ErrBadModel = errors.New("the model file is bad")

// errorReply makes a reply of an error.
func errorReply(err error) reply {
	r := reply{Error: err.Error()}
	if _, ok := errors.AsType[*gguf.FormatError](err); ok {
		r.Kind = "model"
		return r
	}
	for _, e := range wireErrors {
		if errors.Is(err, e.err) {
			r.Kind = e.kind
			break
		}
	}
	return r
}

// err is the error that a reply brings, nil if it brings none.
func (r *reply) err() error {
	if r.Error == "" {
		return nil
	}
	e := &HolderError{Text: r.Error}
	for _, known := range wireErrors {
		if known.kind == r.Kind {
			e.kind = known.err
		}
	}
	return e
}

// HolderError is an error that a Holder answered.
type HolderError struct {
	Text string // as the Holder put it
	kind error
}

// Error is the Holder's text.
func (e *HolderError) Error() string { return e.Text }

// Unwrap makes the error match ErrUnknownModel, ErrModelExists, ErrAttached, ErrInsufficientMemory, ErrBadModel, ErrBadOption or
// ErrClosed, if it was one of them for the Holder.
func (e *HolderError) Unwrap() error { return e.kind }

// frame makes a message of v.
func frame(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(b)), uint32(len(b))), b...), nil
}

// writeMessage sends v.
func writeMessage(w io.Writer, v any) error {
	b, err := frame(v)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// readMessage receives v, of at most limit bytes. The error is io.EOF when the other side closed the connection between messages.
func readMessage(r io.Reader, v any, limit int) error {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > uint32(limit) {
		return fmt.Errorf("loader: a message of %d bytes, the limit is %d: not a client or server of this protocol", n, limit)
	}
	// Read as it comes: a length alone must not make anybody allocate.
	b, err := io.ReadAll(io.LimitReader(r, int64(n)))
	if err != nil {
		return err
	}
	if uint32(len(b)) < n {
		return io.ErrUnexpectedEOF
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("loader: a message that is not of this protocol: %w", err)
	}
	return nil
}
