package hold

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// ask sends a request and returns the first reply that does not tell to wait, and the descriptors that come with it.
// The Holder may be silent for so long, and a reply has to come within the given time once it has begun. waiting may be
// nil.
func ask(ctx context.Context, conn *net.UnixConn, r request, silent, within time.Duration,
	waiting func(string),
) (*reply, []*os.File, error) {
	r.Version = wireVersion
	if err := conn.SetWriteDeadline(time.Now().Add(within)); err != nil {
		return nil, nil, err
	}
	if ctx.Err() != nil { // its end may have set a deadline just before
		return nil, nil, context.Cause(ctx)
	}
	if waiting != nil {
		p := &patience{conn: conn, tell: waiting}
		p.timer = time.AfterFunc(waitingTime, p.silent)
		defer p.stop()
		waiting = p.told
	}
	if err := writeMessage(conn, r); err != nil && !errors.Is(err, syscall.EPIPE) { // with EPIPE, a reply may say why
		return nil, nil, fmt.Errorf("hold: %w", err)
	}
	for {
		var answer reply
		files, err := receive(ctx, conn, &answer, silent, within)
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
				err = fmt.Errorf("hold: %w: %w", ErrGone, err)
			}
			return nil, nil, err
		}
		if answer.Waiting == "" {
			if err := answer.err(); err != nil {
				closeAll(files)
				return nil, nil, err
			}
			return &answer, files, nil
		}
		closeAll(files)
		if waiting != nil {
			waiting(cut(answer.Waiting, maxErrorText))
		}
	}
}

// patience tells somebody for whom they wait: what the Holder says, or, when it says nothing, the Holder.
type patience struct {
	conn *net.UnixConn
	tell func(string)

	mu    sync.Mutex
	timer *time.Timer
	over  bool
}

// silent is called when the Holder has said nothing for a while.
func (p *patience) silent() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.over {
		p.tell("the holder, " + who(p.conn))
		p.timer.Reset(waitingTime)
	}
}

// told is called when the Holder has said what it waits for.
func (p *patience) told(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.timer.Reset(2 * waitingTime) // it says so again before that
	p.tell(what)
}

func (p *patience) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
	p.timer.Stop()
}
