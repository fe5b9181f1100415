package loader

import (
	"context"
	"path/filepath"
	"regexp"
	"time"
)

// HolderClient talks to a Holder. The zero value talks to the one at SocketPath. Errors: *HolderError for what the Holder
// answers, those of connecting, and the cause of the context's end.
type HolderClient struct {
	Socket string // "": SocketPath
}

// AddRequest says which model a Holder shall load, and how. What is left open is as the Holder's own options are.
type AddRequest struct {
	Path    string         // of the file; made absolute, since the Holder may be in another directory
	Name    string         // "": the file's name without .gguf
	DType   *DType         // nil: the Holder's
	Rules   []Rule         // nil: the Holder's
	Tensors *regexp.Regexp // nil: the Holder's
}

// List returns what the Holder holds.
func (c HolderClient) List(ctx context.Context) ([]HeldModel, error) {
	return c.ask(ctx, request{Op: "list"})
}

// Add makes the Holder load a model, and returns what it holds once the load has begun.
func (c HolderClient) Add(ctx context.Context, a AddRequest) ([]HeldModel, error) {
	path, err := filepath.Abs(a.Path)
	if err != nil {
		return nil, err
	}
	r := request{Op: "add", Model: path, Name: a.Name}
	if a.DType != nil {
		r.DType = a.DType.String()
	}
	for _, rule := range a.Rules {
		r.Rules = append(r.Rules, rule.String())
	}
	if a.Tensors != nil {
		r.Tensors = a.Tensors.String()
	}
	return c.ask(ctx, r)
}

// Drop makes the Holder free a model, and returns what it still holds. The error matches ErrAttached while processes use it.
func (c HolderClient) Drop(ctx context.Context, name string) ([]HeldModel, error) {
	return c.ask(ctx, request{Op: "drop", Model: name})
}

// ask sends a request on a connection of its own.
func (c HolderClient) ask(ctx context.Context, r request) ([]HeldModel, error) {
	conn, err := dial(ctx, c.Socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })()
	answer, err := ask(conn, r)
	if err != nil {
		return nil, orCause(ctx, err)
	}
	return answer.Models, nil
}
