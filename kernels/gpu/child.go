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

// answer is what the child says, as JSON: the code, or why there is none.
type answer struct {
	Code    []byte               `json:"code,omitempty"`
	Refused *amdhip.CompileError `json:"refused,omitempty"` // in place of Error, where it is one
	Error   string               `json:"error,omitempty"`
}

// maxMessages is how much of what the child prints gets into an error: the first bytes, which say what came first.
const maxMessages = 4 << 10

// crash matches what Go prints when the C code of a process has crashed; such a process ends with an exit code all the same.
var crash = regexp.MustCompile(`(?m)^(SIG[A-Z]+: |fatal error: )`)

// Child returns a function for Compiler.Run that compiles in a process of its own, so that a compiler which aborts takes only
// that with it. It runs the program name with args, which must call ServeChild with its standard input and output and then
// exit. The end of the context kills the process.
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
			return nil, fmt.Errorf("the compiler crashed (%v), as some versions do for architectures they do not know; "+
				"convert on the CPU instead (--dequant cpu)%s", exit, messages.indented())
		case ended:
			return nil, fmt.Errorf("the compiler's process %s failed (%v)%s", name, exit, messages.indented())
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
			return nil, fmt.Errorf("the compiler's process %s answered with something else than code%s", name, messages.indented())
		}
		return a.Code, nil
	}
}

// ServeChild is the other side of Child: it reads one Request from in, compiles it in this process, and writes to out what came
// of it, code or error. It returns an error when it cannot read the request or write the answer. A program that wants an
// abort to end it silently, rather than print what its goroutines do, ignores SIGABRT before (signal.Ignore).
func ServeChild(in io.Reader, out io.Writer) error {
	var r Request
	if err := json.NewDecoder(io.LimitReader(in, maxCode)).Decode(&r); err != nil {
		return fmt.Errorf("gpu: no request for the compiler: %w", err)
	}
	var a answer
	var err error
	if a.Code, err = r.Compile(); err != nil {
		a = answer{Error: err.Error()}
		a.Refused, _ = errors.AsType[*amdhip.CompileError](err)
	}
	if err := json.NewEncoder(out).Encode(a); err != nil {
		return fmt.Errorf("gpu: handing over the code: %w", err)
	}
	return nil
}

// bounded takes no more than limit bytes and forgets the rest.
type bounded struct {
	taken []byte
	limit int
}

func (b *bounded) Write(p []byte) (int, error) {
	b.taken = append(b.taken, p[:min(len(p), b.limit-len(b.taken))]...)
	return len(p), nil
}

// indented returns the lines to go below an error.
func (b *bounded) indented() string {
	text := strings.TrimSpace(string(b.taken))
	if text == "" {
		return ""
	}
	return "\n\t" + strings.ReplaceAll(text, "\n", "\n\t")
}
