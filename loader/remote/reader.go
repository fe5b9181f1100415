package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"time"
)

// reader reads one range of a file. If a reply ends before the range does, it asks for the rest, from the byte that was
// reached on.
type reader struct {
	f        *file
	ctx      context.Context
	off, end int64 // the next byte, and the one behind the last
	tries    int   // attempts in a row without a byte before it gives up
	attempts int   // failed ones since the last byte came
	err      error // that ended it
	pace     pace

	resp   *http.Response // that is being read; nil: none
	to     int64          // the byte behind the last one of that reply
	cancel context.CancelCauseFunc
	watch  *time.Timer // cancels the reply when a read takes too long
}

// Read reads what has come of the range, at least a byte. It reads from the connection straight into b.
func (r *reader) Read(b []byte) (int, error) {
	switch {
	case r.err != nil:
		return 0, r.err
	case r.off == r.end:
		return 0, io.EOF
	case len(b) == 0:
		return 0, nil
	}
	for {
		if r.err = r.connect(); r.err != nil {
			return 0, r.err
		}
		last := min(r.to, r.end) // a reply may hold less than the range, or more if the range has been shortened since
		began := time.Now()
		n, err := r.body(b[:min(int64(len(b)), last-r.off)])
		slow := r.pace.add(int64(n), time.Since(began), r.f.c.o.Stall, r.f.c.o.MinRate)
		if n > 0 {
			r.attempts = r.pace.slow // in a row
			if slow != nil {
				r.attempts-- // again counts this one
			}
			r.f.c.bytes.Add(int64(n))
		}
		r.off += int64(n)
		if r.off == last {
			if r.err = r.finish(err); r.err != nil {
				r.off -= int64(n)
				return 0, r.err
			}
			if slow != nil && r.off < r.end { // the reply was a short one
				r.err = r.again(slow)
			}
			return n, nil
		}
		if err == nil {
			err = slow
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("its body ended early: %w", io.ErrUnexpectedEOF)
			}
			r.drop()
			r.err = r.again(err)
		}
		switch {
		case n > 0:
			return n, nil // an error waits for the next call
		case r.err != nil:
			return 0, r.err
		}
	}
}

// pace is how quickly a range comes.
type pace struct {
	spent time.Duration // waiting for the server, since it was looked at last
	bytes int64         // that came in that time
	slow  int           // how often in a row they were too few
}

// add counts bytes that have come, and the time that it took. Whenever they took as long as period it compares them
// with the rate. The error matches ErrSlow.
func (p *pace) add(n int64, took, period time.Duration, rate int64) error {
	p.spent += took
	p.bytes += n
	if p.spent < period || rate < 0 {
		return nil
	}
	spent, got := p.spent, p.bytes
	p.spent, p.bytes = 0, 0
	if float64(got) >= float64(rate)*spent.Seconds() {
		p.slow = 0
		return nil
	}
	p.slow++
	return fmt.Errorf("%w: %d bytes in %v, less than %d a second", ErrSlow, got, spent.Round(time.Second), rate)
}

// connect makes sure that there is a reply that goes on at r.off. It asks as often as the options allow.
func (r *reader) connect() error {
	for r.resp == nil && r.off < r.end {
		if r.ctx.Err() != nil {
			return context.Cause(r.ctx)
		}
		ctx, cancel := context.WithCancelCause(r.ctx)
		began := time.Now()
		resp, to, err := r.f.get(ctx, r.off, r.end)
		if err != nil {
			cancel(nil)
			if err := r.again(err); err != nil {
				return err
			}
			continue
		}
		r.pace.spent += time.Since(began)
		r.f.c.replies.Add(1)
		r.end = min(r.end, r.f.Size()) // not known before the first reply of all
		r.resp, r.to, r.cancel = resp, to, cancel
		r.watch = time.AfterFunc(r.f.c.o.Stall, func() { cancel(ErrStalled) })
		r.watch.Stop()
		if r.end == 0 {
			r.drop()
		}
	}
	return nil
}

// body reads from the reply, for no longer than Options.Stall.
func (r *reader) body(b []byte) (int, error) {
	r.watch.Reset(r.f.c.o.Stall)
	n, err := r.resp.Body.Read(b)
	if !r.watch.Stop() && err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w for %v", ErrStalled, r.f.c.o.Stall)
	}
	return n, err
}

// finish ends a reply of which no more is wanted; err is what the last read returned. If that was its last byte,
// nothing may follow. Only a body that was announced without a length can be longer than it should be.
func (r *reader) finish(err error) error {
	var one [1]byte
	n := 0
	for err == nil && n == 0 && r.resp.ContentLength < 0 && r.off == r.to {
		n, err = r.body(one[:])
	}
	r.drop()
	if n > 0 {
		r.attempts++
		return r.failure(fmt.Errorf("%w: its body is longer than that", ErrReply))
	}
	return nil
}

// again counts a failed attempt, and waits before the next one. It returns an error if there is to be none.
func (r *reader) again(err error) error {
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	c := r.f.c
	r.attempts++
	if !transient(err) || r.attempts >= r.tries {
		return r.failure(err)
	}
	pause := min(c.o.Pause<<min(r.attempts-1, 20), maxPause)
	pause = pause/2 + rand.N(pause/2+1) // so that readers that failed together do not come back together
	if s, ok := errors.AsType[*StatusError](err); ok {
		pause = max(pause, s.after)
	}
	c.retries.Add(1)
	level := slog.LevelInfo
	if r.attempts > 2 { // more than a connection that broke
		level = slog.LevelWarn
	}
	c.o.Logger.Log(r.ctx, level, "trying again", "url", r.f.path, "offset", r.off, "in", pause, "error", err)
	wait := time.NewTimer(pause)
	defer wait.Stop()
	select {
	case <-wait.C:
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

// failure returns the error for what is missing of the range.
func (r *reader) failure(err error) error {
	return &Error{URL: r.f.path, Offset: r.off, Bytes: r.end - r.off, Attempts: r.attempts, Err: err}
}

// drop ends the reply. Its connection is used again if the body has been read to its end.
func (r *reader) drop() {
	if r.resp == nil {
		return
	}
	r.f.c.replies.Add(-1)
	r.watch.Stop()
	_ = r.resp.Body.Close()
	r.cancel(nil)
	r.resp = nil
}

// Close ends the reader.
func (r *reader) Close() error {
	r.drop()
	if r.err == nil {
		r.err = errClosed
	}
	return nil
}

var errClosed = errors.New("remote: reader is closed")
