package hold

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/loader"
)

// The protocol between a Holder and its clients, version 3.
//
// Both sides send messages over a Unix stream socket: four bytes with the length, big-endian, then that many bytes of
// JSON, an object. A client sends one message, a [request] of at most 64 KiB, within 10 seconds. The Holder sends
// [reply] messages of at most 64 MiB; how many depends on the operation:
//
//   - "list": one reply with the models.
//   - "add": one reply with the models, once the memory of the new one is allocated and it is being loaded, or with the
//     error that prevented it.
//   - "drop": one reply with the other models, once the model's memory is free, or with an error.
//   - "sleep", "wake", "pin", "unpin": one reply with the models, once it is done, or with an error.
//   - "attach": a reply with the manifest, how many tensors have arrived, and whether all have; if not, one more reply
//     when more have, and one with loaded or an error. A model that is not in device memory is woken first. Tensors
//     arrive in the order of the file: by part, by offset in it, and as the manifest lists them where both are equal.
//     A reply with ending says that the Holder is about to end. The connection stays open for as long as the client
//     uses the memory: its end tells either side that the other has gone. The client says nothing more, and unmaps the
//     memory before it closes the connection.
//
// All but "list" and "attach" are for the Holder's own user. Before the first reply to any operation there may be
// replies with waiting alone, one every two seconds: they say what the Holder waits for, for people.
//
// How a client gets at the memory is the manifest's share. With "ipc" each allocation has a hipIpcMemHandle_t. With
// "fd" the message with the manifest has as many descriptors with it as there are allocations, at most 253, in the
// order of the allocations, as SCM_RIGHTS of its first byte. Each is for hipMemImportFromShareableHandle, of size
// bytes, and is to be mapped at address, where the device allows it, so that the model is at the same place in all
// processes. Then the memory stays for as long as somebody has it, whatever becomes of the Holder: when the connection
// ends, and the model is loaded, the client may go on using the memory. It should ask for "attach" again, with the
// manifest's residence in the request, until a Holder knows that: a new one that has adopted the memory. To such a
// request the Holder answers with the manifest and without descriptors; where it does not have that residence, with an
// error of the kind "unknown", and it neither wakes nor loads anything.
//
// The Holder closes a connection on anything else. Either side ignores fields that it does not know, so that fields can
// be added. A change that this does not allow for makes a new version; a Holder refuses requests of versions that it
// does not know, and says which one it speaks. Version 2 listed devices and groups in the manifest, where version 1 had
// one device; version 3 has tiers and descriptors.

// wireVersion is the version of the protocol.
const wireVersion = 3

const (
	// maxRequest bounds what a Holder reads from anybody.
	maxRequest = 64 << 10
	// maxReply bounds what a client reads from a Holder: the manifest of a model with some 250,000 tensors.
	maxReply = 64 << 20
	// messageTime is how long a Holder may take to send a message that it has begun to send.
	messageTime = 10 * time.Second
	// silentTime is how long a Holder may say nothing to who waits for a reply. While it works, it says so every two
	// seconds.
	silentTime = time.Minute

	// What a message of a Holder may have for its size. Its values take more memory than its text, and these are what
	// they are counted by; real messages have half as many. So a message costs at most eight times its size.
	smallMessage = 64 << 10 // bytes: below that nothing is counted
	objectBytes  = 80       // of text for each object
	arrayBytes   = 12       // for each array
	commaBytes   = 4        // for each comma
	maxErrorText = 4 << 10  // bytes of what a Holder says about an error
)

// request is what a client asks for.
type request struct {
	Version int    `json:"version"`
	Op      string `json:"op"`              // "list", "add", "drop", "sleep", "wake", "pin", "unpin" or "attach"
	Model   string `json:"model,omitempty"` // its name; "" is the only one, or with add the file's name without .gguf

	// Of attach.

	Residence string `json:"residence,omitempty"` // the manifest's, when the client has the memory already
	Rank      *int   `json:"rank,omitempty"`      // whose part is wanted, of a model that is held in parts
	World     int    `json:"world,omitempty"`     // the number of ranks; 0: unknown

	// Of add. What is missing is as the Holder's own Spec says.

	Path    string   `json:"path,omitempty"` // of the file, absolute
	Policy  string   `json:"policy,omitempty"`
	Rules   []string `json:"rules,omitempty"`   // each REGEXP=POLICY
	Tensors string   `json:"tensors,omitempty"` // a regular expression
}

// reply is what a Holder answers. With an error there is nothing else.
type reply struct {
	Version  int         `json:"version"`
	Error    string      `json:"error,omitempty"`
	Kind     string      `json:"kind,omitempty"`     // of the error, see wireErrors
	Manifest *manifest   `json:"manifest,omitempty"` // in the first reply to attach
	Ready    int         `json:"ready,omitempty"`    // so many tensors, from the first on, have arrived
	Loaded   bool        `json:"loaded,omitempty"`   // all have
	Waiting  string      `json:"waiting,omitempty"`  // for whom or what; nothing else is said with it
	Ending   bool        `json:"ending,omitempty"`   // the Holder is about to end
	Models   list[Model] `json:"models,omitempty"`
}

// wireErrors are the errors whose kind a client learns, so that errors.Is works on its side. The first that matches
// counts.
var wireErrors = []struct {
	kind   string
	holder error // at the Holder
	client error // what that is to the client
}{
	{"unknown", ErrUnknownModel, ErrUnknownModel},
	{"exists", ErrModelExists, ErrModelExists},
	{"attached", ErrAttached, ErrAttached},
	{"pinned", ErrPinned, ErrPinned},
	{"memory", loader.ErrInsufficientMemory, loader.ErrInsufficientMemory},
	{"model", ErrBadModel, ErrBadModel},
	{"option", loader.ErrBadOption, loader.ErrBadOption},
	{"denied", fs.ErrPermission, fs.ErrPermission},
	{"stalled", loader.ErrStalled, loader.ErrStalled},
	{"closing", loader.ErrClosed, ErrGone},
}

// ErrBadModel is matched by what a Holder answers when the file that it shall add is damaged, hostile or of another
// format.
var ErrBadModel = errors.New("the model file is bad")

// errorReply makes a reply of an error.
func errorReply(err error) reply {
	r := reply{Error: err.Error()}
	if _, ok := errors.AsType[*gguf.FormatError](err); ok {
		r.Kind = "model"
		return r
	}
	for _, e := range wireErrors {
		if errors.Is(err, e.holder) {
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
	// Further lines are indented, so that none of them looks like one that this process writes.
	e := &Error{Text: strings.ReplaceAll(cut(r.Error, maxErrorText), "\n", "\n  ")}
	for _, known := range wireErrors {
		if known.kind == r.Kind {
			e.kind = known.client
		}
	}
	return e
}

// Error is an error that a Holder answered.
type Error struct {
	Text string // the Holder's; lines behind the first one are indented
	kind error
}

// Error returns the Holder's text.
func (e *Error) Error() string { return e.Text }

// Unwrap makes the error match ErrUnknownModel, ErrModelExists, ErrAttached, ErrPinned, ErrBadModel, fs.ErrPermission,
// or the loader's ErrInsufficientMemory, ErrBadOption or ErrStalled, if it did so in the Holder; and ErrGone if the
// Holder is closed.
func (e *Error) Unwrap() error { return e.kind }

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

// readMessage receives v, of at most limit bytes. The error is io.EOF when the other side closed the connection between
// messages.
func readMessage(r io.Reader, v any, limit int) error {
	n, err := readLength(r, limit)
	if err != nil {
		return err
	}
	return readBody(r, v, n)
}

// readLength reads the first part of a message, and returns the length of the second one.
func readLength(r io.Reader, limit int) (int64, error) {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return 0, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n > uint32(limit) {
		return 0, fmt.Errorf("hold: a message of %d bytes, the limit is %d: the other side does not speak this protocol", n, limit)
	}
	return int64(n), nil
}

// readBody reads the second part of a message, of n bytes. It allocates no more than twice what comes: a length alone
// costs nothing. Decoding costs at most as much as checkMessage allows.
func readBody(r io.Reader, v any, n int64) error {
	var b []byte
	for int64(len(b)) < n {
		more := make([]byte, min(n, max(64<<10, 2*int64(len(b)))))
		at := copy(more, b)
		if _, err := io.ReadFull(r, more[at:]); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		b = more
	}
	if err := checkMessage(b); err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		// it may quote the message
		return fmt.Errorf("hold: a message that is not of this protocol: %s", cut(err.Error(), 300))
	}
	return nil
}

// checkMessage refuses a message that would take much more memory than its text does.
func checkMessage(b []byte) error {
	if len(b) <= smallMessage {
		return nil
	}
	var objects, arrays, commas int
	for c := range outsideStrings(b) {
		switch c {
		case '{':
			objects++
		case '[':
			arrays++
		case ',':
			commas++
		}
	}
	if objects > len(b)/objectBytes || arrays > len(b)/arrayBytes || commas > len(b)/commaBytes {
		return fmt.Errorf("hold: a message of %d bytes has %d objects, %d arrays and %d commas: the other side is damaged or hostile",
			len(b), objects, arrays, commas)
	}
	return nil
}

// cut returns the first n bytes of s, if it is longer with a mark at the end.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}

// receive reads a reply, and takes the descriptors that come with it. The Holder has to begin it within silent, 0: at
// any time, and then to send it within the given time.
func receive(ctx context.Context, conn *net.UnixConn, r *reply, silent, within time.Duration) ([]*os.File, error) {
	if silent > 0 {
		if err := conn.SetReadDeadline(time.Now().Add(silent)); err != nil {
			return nil, err
		}
		if ctx.Err() != nil { // its end may have set a deadline just before
			return nil, context.Cause(ctx)
		}
	}
	n, files, err := readLengthAndFiles(conn, maxReply, func() error {
		err := conn.SetReadDeadline(time.Now().Add(within))
		if err == nil && ctx.Err() != nil { // its end may have set a deadline just before
			err = context.Cause(ctx)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	err = readBody(conn, r, n)
	if err == nil {
		err = conn.SetReadDeadline(time.Time{})
	}
	if err != nil {
		closeAll(files)
		return nil, err
	}
	return files, nil
}

// closeAll closes files that are only read from, or not at all.
func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}
