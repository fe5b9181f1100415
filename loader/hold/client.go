package hold

import (
	"context"
	"path/filepath"
	"regexp"
	"time"

	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

// Client talks to a Holder in another process. The zero value talks to the one at SocketPath. Errors are *Error for
// what the Holder answers, those of connecting, what matches ErrGone when it ends before it answers, and the cause of
// the context's end.
type Client struct {
	Socket string // "": SocketPath
	// Waiting is told, every two seconds, for whom or what a call waits: see AttachOptions.Waiting.
	Waiting func(what string)
}

// AddRequest says which model a Holder shall load, and how. What is left open is as the Holder's own Spec says.
type AddRequest struct {
	Path string // of the file; made absolute, since the Holder may be in another directory
	// Elsewhere says that Path is no path, but a name for the Holder's Opener.
	Elsewhere bool
	Name      string         // "": the file's name without .gguf
	Policy    *plan.Policy   // nil: the Holder's
	Rules     []plan.Rule    // nil: the Holder's
	Tensors   *regexp.Regexp // nil: the Holder's
}

// List returns what the Holder holds.
func (c Client) List(ctx context.Context) ([]Model, error) {
	return c.ask(ctx, request{Op: "list"})
}

// Add makes the Holder load a model, and returns what it holds once the load has begun.
func (c Client) Add(ctx context.Context, a AddRequest) ([]Model, error) {
	path := a.Path
	if !a.Elsewhere {
		var err error
		if path, err = filepath.Abs(path); err != nil {
			return nil, err
		}
	}
	r := request{Op: "add", Path: path, Model: a.Name}
	if a.Policy != nil {
		r.Policy = a.Policy.String()
	}
	for _, rule := range a.Rules {
		r.Rules = append(r.Rules, rule.String())
	}
	if a.Tensors != nil {
		r.Tensors = a.Tensors.String()
	}
	return c.ask(ctx, r)
}

// Drop makes the Holder free a model, and returns what it still holds. The error matches ErrAttached while processes
// use the model, and loader.ErrStalled when its memory cannot be freed as a device hangs.
func (c Client) Drop(ctx context.Context, name string) ([]Model, error) {
	return c.ask(ctx, request{Op: "drop", Model: name})
}

// Sleep makes the Holder take a model out of device memory; see Holder.Sleep.
func (c Client) Sleep(ctx context.Context, name string) ([]Model, error) {
	return c.ask(ctx, request{Op: "sleep", Model: name})
}

// Wake makes the Holder bring a model back to device memory, and returns when it is there; see Holder.Wake.
func (c Client) Wake(ctx context.Context, name string) ([]Model, error) {
	return c.ask(ctx, request{Op: "wake", Model: name})
}

// Pin makes the Holder leave a model in its tier; see Holder.Pin.
func (c Client) Pin(ctx context.Context, name string) ([]Model, error) {
	return c.ask(ctx, request{Op: "pin", Model: name})
}

// Unpin undoes Pin.
func (c Client) Unpin(ctx context.Context, name string) ([]Model, error) {
	return c.ask(ctx, request{Op: "unpin", Model: name})
}

// ask sends a request on a connection of its own.
func (c Client) ask(ctx context.Context, r request) ([]Model, error) {
	conn, err := dial(ctx, c.Socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })()
	answer, files, err := ask(ctx, conn, r, silentTime, messageTime, c.Waiting)
	closeAll(files)
	if err != nil {
		return nil, orCause(ctx, err)
	}
	return answer.Models, nil
}
