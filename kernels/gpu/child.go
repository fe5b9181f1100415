package gpu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
)

// ErrCompilerCrashed is matched by the error of a Child whose process has crashed, as some versions of AMD's compiler
// do for architectures that they do not know. The device is usable without kernels: convert on the CPU.
var ErrCompilerCrashed = errors.New("the compiler crashed")

// answer is what the child process writes to its standard output, as JSON: the code object, or why there is none.
type answer struct {
	Code    []byte               `json:"code,omitempty"`
	Refused *amdhip.CompileError `json:"refused,omitempty"` // the error, if it is one of this type
	Error   string               `json:"error,omitempty"`   // every other error
}

// maxMessages bounds how many bytes of the child's standard error get into an error: the first ones, which tell the
// cause.
const maxMessages = 4 << 10

// crash matches what Go prints when the C code of a process crashes. Such a process ends with an exit code, not by a
// signal.
var crash = regexp.MustCompile(`(?m)^(SIG[A-Z]+: |fatal error: )`)

// Child returns a function for Compiler.Run that compiles each kernel in a child process: a compiler that aborts ends
// only that. The child is the program name with the arguments args. It must call ServeChild with its standard input and
// output, and then exit. When the context ends, the child is killed. Errors: *amdhip.CompileError, one that matches
// ErrCompilerCrashed, the cause of the context's end, and errors with what the child has printed.
func Child(name string, args ...string) func(ctx context.Context, r Request) ([]byte, error) {
	return func(ctx context.Context, r Request) ([]byte, error) {
		in, err := json.Marshal(r)
		if err != nil {
			return nil, err
		}
		out, messages := bounded{limit: 2 * maxCode}, bounded{limit: maxMessages}
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &messages
		cmd.WaitDelay = time.Second
		err = cmd.Run()
		exit, ended := errors.AsType[*exec.ExitError](err)
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case ended && (!exit.Exited() || crash.Match(messages.taken)):
			return nil, fmt.Errorf("%w (%v), as some versions do for architectures they do not know; "+
				"convert on the CPU instead%s", ErrCompilerCrashed, exit.String(), messages.indented())
		case ended:
			return nil, fmt.Errorf("the compiler's process %s failed (%v)%s", name, exit.String(), messages.indented())
		case err != nil:
			return nil, fmt.Errorf("the compiler's process: %w", err)
		}
		var a answer
		err = json.Unmarshal(out.taken, &a)
		switch {
		case err == nil && a.Refused != nil:
			return nil, a.Refused
		case err == nil && a.Error != "":
			return nil, errors.New(a.Error)
		case err != nil || len(a.Code) == 0:
			return nil, fmt.Errorf("the compiler's process %s answered with something that is no code object%s",
				name, messages.indented())
		}
		return a.Code, nil
	}
}

// ServeChild is what the child process of Child calls: it reads one Request from in, compiles it in this process, and
// writes the code object or the error to out. It returns an error if it cannot read the request or write the answer. On
// an abort Go prints the stacks of all goroutines; a program that is to end silently calls
// signal.Ignore(syscall.SIGABRT) first.
func ServeChild(in io.Reader, out io.Writer) error {
	var r Request
	if err := json.NewDecoder(io.LimitReader(in, maxCode)).Decode(&r); err != nil {
		return fmt.Errorf("gpu: reading the request to compile: %w", err)
	}
	var a answer
	var err error
	if a.Code, err = r.Compile(); err != nil {
		a = answer{Error: err.Error()}
		a.Refused, _ = errors.AsType[*amdhip.CompileError](err)
	}
	if err := json.NewEncoder(out).Encode(a); err != nil {
		return fmt.Errorf("gpu: writing the code object: %w", err)
	}
	return nil
}

// bounded is a writer that keeps the first limit bytes and drops the rest.
type bounded struct {
	taken []byte
	limit int
}

func (b *bounded) Write(p []byte) (int, error) {
	b.taken = append(b.taken, p[:min(len(p), b.limit-len(b.taken))]...)
	return len(p), nil
}

// indented returns what was written as indented lines that follow an error's text.
func (b *bounded) indented() string {
	text := strings.TrimSpace(string(b.taken))
	if text == "" {
		return ""
	}
	return "\n\t" + strings.ReplaceAll(text, "\n", "\n\t")
}
