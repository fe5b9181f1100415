package loader

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// The protocol between a Holder and those who attach to its models, version 1. Both sides send messages over a Unix stream
// socket: four bytes with the length, big-endian, then that many bytes of JSON. A client sends one request; what answers it
// depends on the operation:
//
//   - "list": one reply with the models.
//   - "add": one reply, once the model is being loaded, or with the error that prevented it.
//   - "drop": one reply, once the model's memory is free, or with an error.
//   - "attach": a reply with the manifest, then one whenever more tensors have arrived, then one with loaded or an error. The
//     connection stays open as long as the client uses the memory: its end is how either side notices the other's.
//
// What one side does not know in a message of the other it ignores, so fields can be added. A change that this does not allow
// for makes a new version; a Holder refuses requests of versions that it does not know, by number.

// wireVersion is the version of the protocol.
const wireVersion = 1

const (
	// maxRequest bounds what a Holder reads from anybody.
	maxRequest = 64 << 10
	// maxReply bounds what a client reads from a Holder: the manifest of a model with a million tensors.
	maxReply = 256 << 20
)

// request is what a client asks for.
type request struct {
	Version int    `json:"version"`
	Op      string `json:"op"`
	Model   string `json:"model,omitempty"` // name, "" for the only one; of add: path of the file

	// Of add: as the flags of load say it. What is missing is as the Holder's own options are.

	Name    string   `json:"name,omitempty"`
	DType   string   `json:"dtype,omitempty"`
	Rules   []string `json:"rules,omitempty"`
	Tensors string   `json:"tensors,omitempty"`
}

// reply is what a Holder answers. An error says why there is nothing else; Busy and Missing tell kinds of errors apart.
type reply struct {
	Version  int         `json:"version"`
	Error    string      `json:"error,omitempty"`
	Kind     string      `json:"kind,omitempty"`     // of the error, see wireErrors
	Manifest *manifest   `json:"manifest,omitempty"` // first answer to attach
	Ready    int         `json:"ready,omitempty"`    // so many tensors, from the first on, have arrived
	Loaded   bool        `json:"loaded,omitempty"`   // all have
	Models   []HeldModel `json:"models,omitempty"`
}

// wireErrors are the errors that a client gets to know by kind, so that errors.Is works on its side.
var wireErrors = map[string]error{
	"unknown":  ErrUnknownModel,
	"exists":   ErrModelExists,
	"attached": ErrAttached,
	"closing":  ErrClosed,
	"memory":   ErrInsufficientMemory,
}

// errorReply makes a reply of an error.
func errorReply(err error) reply {
	r := reply{Error: err.Error()}
	for kind, target := range wireErrors {
		if errors.Is(err, target) {
			r.Kind = kind
		}
	}
	return r
}

// err is the error that a reply brings, nil if it brings none.
func (r *reply) err() error {
	if r.Error == "" {
		return nil
	}
	return &HolderError{Text: r.Error, kind: wireErrors[r.Kind]}
}

// HolderError is an error that a Holder answered.
type HolderError struct {
	Text string // as the Holder put it
	kind error
}

// Error is the Holder's text.
func (e *HolderError) Error() string { return e.Text }

// Unwrap makes the error match ErrUnknownModel, ErrModelExists, ErrAttached, ErrClosed or ErrInsufficientMemory, if it was one of them
// for the Holder.
func (e *HolderError) Unwrap() error { return e.kind }

// writeMessage sends v.
func writeMessage(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	framed := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(b)), uint32(len(b)))
	_, err = w.Write(append(framed, b...))
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
