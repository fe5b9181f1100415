package loader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"time"
)

const (
	// requestTime is how long a client may take to say what it wants.
	requestTime = 10 * time.Second
	// sendTime is how long a client may take to receive a message, as long as it uses no memory.
	sendTime = 10 * time.Second
	// maxClients bounds the connections that are served at the same time.
	maxClients = 1024
)

// Serve answers those who connect to l, a Unix socket (see Listen), until ctx ends. Then nobody is let in any more, and it returns
// once all attached processes have gone, or after grace, when their connections are closed. A client that dies, hangs or does not
// speak the protocol loses its connection and nothing else happens. Serve closes l.
func (h *Holder) Serve(ctx context.Context, l *net.UnixListener, grace time.Duration) error {
	gone, cut := context.WithCancelCause(context.WithoutCancel(ctx)) // ends when connections are to be closed
	defer cut(nil)
	s := &server{Holder: h, ctx: ctx, gone: gone, slots: make(chan struct{}, h.o.maxClients)}
	defer context.AfterFunc(ctx, func() { _ = l.Close() })() // Accept tells
	err := s.accept(l)
	if ctx.Err() == nil {
		cut(err)
		s.clients.Wait()
		return errors.Join(err, l.Close())
	}
	idle := make(chan struct{})
	go func() { s.clients.Wait(); close(idle) }()
	select {
	case <-idle:
	case <-time.After(grace):
		h.log.Warn("closing the connections of processes that are still attached", "after", grace)
		cut(ErrClosed)
		<-idle
	}
	return nil
}

// server is one call of Serve.
type server struct {
	*Holder
	ctx, gone context.Context // the end of accepting, and that of the connections
	slots     chan struct{}
	clients   sync.WaitGroup
}

// accept serves connections until ctx ends or accepting fails for good.
func (s *server) accept(l *net.UnixListener) error {
	for pause := time.Millisecond; ; {
		conn, err := l.AcceptUnix()
		switch {
		case s.ctx.Err() != nil:
			if err == nil {
				_ = conn.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil: // too many open files, mostly: it passes
			s.log.Warn("accepting a connection failed", "error", err)
			pause = min(2*pause, time.Second)
			time.Sleep(pause)
			continue
		}
		pause = time.Millisecond
		select {
		case s.slots <- struct{}{}:
		default:
			s.refuse(conn, fmt.Errorf("loader: %d clients are connected already", s.o.maxClients))
			_ = conn.Close()
			continue
		}
		s.clients.Go(func() {
			defer func() { <-s.slots }()
			defer conn.Close()
			defer context.AfterFunc(s.gone, func() { _ = conn.Close() })()
			s.serve(conn)
		})
	}
}

// refuse tells a client why it is turned away.
func (s *server) refuse(conn *net.UnixConn, err error) {
	s.mu.Lock()
	s.refused++
	s.mu.Unlock()
	s.log.Warn("refused a connection", "error", err)
	_ = s.send(conn, errorReply(err)) // it may have gone
}

// send sends one reply, in bounded time.
func (s *server) send(conn *net.UnixConn, r reply) error {
	r.Version = wireVersion
	if err := conn.SetWriteDeadline(time.Now().Add(sendTime)); err != nil {
		return err
	}
	return writeMessage(conn, r)
}

// serve talks to one client.
func (s *server) serve(conn *net.UnixConn) {
	from, err := checkPeer(conn, s.o.AllowGroup)
	if err != nil {
		s.refuse(conn, err)
		return
	}
	var r request
	if err = conn.SetReadDeadline(time.Now().Add(s.o.requestTime)); err == nil {
		stop := context.AfterFunc(s.ctx, func() { _ = conn.SetReadDeadline(time.Now()) }) // who has said nothing by then is not let in
		err = readMessage(conn, &r, maxRequest)
		if !stop() {
			err = fmt.Errorf("loader: the Holder is ending: %w", ErrClosed)
		}
	}
	if errors.Is(err, io.EOF) {
		return // somebody looked whether there is a Holder
	}
	switch {
	case err != nil:
	case r.Version != wireVersion:
		err = fmt.Errorf("loader: version %d of the protocol is asked for, this is version %d", r.Version, wireVersion)
	case (r.Op == "add" || r.Op == "drop") && !from.owner:
		err = fmt.Errorf("loader: process %d belongs to another user, and may not %s models", from.pid, r.Op)
	}
	if err != nil {
		s.refuse(conn, err)
		return
	}
	switch r.Op {
	case "list":
		err = s.send(conn, reply{Models: s.Models()})
	case "add":
		err = s.send(conn, s.answer(s.addAs(&r)))
	case "drop":
		err = s.send(conn, s.answer(s.Drop(r.Model)))
	case "attach":
		err = s.attach(conn, from, r.Model)
	default:
		s.refuse(conn, fmt.Errorf("loader: unknown operation %q", r.Op))
	}
	if err != nil {
		s.log.Debug("a client went away", "pid", from.pid, "error", err)
	}
}

// answer is the reply to a request that succeeded or failed.
func (s *server) answer(err error) reply {
	if err != nil {
		return errorReply(err)
	}
	return reply{Models: s.Models()}
}

// addAs does what an add request asks for.
func (s *server) addAs(r *request) error {
	if !filepath.IsAbs(r.Model) {
		return fmt.Errorf("%w: %q as a path: it must be absolute", ErrBadOption, r.Model)
	}
	o, err := s.options(r)
	if err != nil {
		return err
	}
	_, err = s.add(s.ctx, r.Name, r.Model, o)
	return err
}

// attach lets a client use a model for as long as it stays connected.
func (s *server) attach(conn *net.UnixConn, from peer, name string) error {
	m, err := s.enter(s.gone, name)
	if err != nil {
		return s.send(conn, errorReply(err))
	}
	s.log.Info("attached", "model", m.name, "pid", from.pid)
	defer func() {
		s.leave(m)
		s.log.Info("detached", "model", m.name, "pid", from.pid)
	}()
	w := m.weights
	ready, loaded := w.arrivedSince(0), false
	select {
	case <-w.finished:
		loaded = w.failure() == nil
	default:
	}
	if err := s.send(conn, reply{Manifest: m.manifest, Ready: ready, Loaded: loaded}); err != nil {
		return err
	}
	// From here on the client may have the memory mapped, so it counts until it is gone, even if it hangs and reads nothing.
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	left, leave := context.WithCancel(s.gone)
	defer leave()
	var listening sync.WaitGroup
	defer listening.Wait() // its read ends with the connection
	defer conn.Close()
	listening.Go(func() {
		defer leave()
		_, _ = conn.Read(make([]byte, 1)) // a client has nothing more to say: what comes is its end
		_ = conn.Close()                  // and that of a message that it does not take
	})
	if !loaded {
		if err := s.report(left, conn, w, ready); err != nil {
			return err
		}
	}
	<-left.Done()
	return nil
}

// report sends word of tensors that arrive after the first ones, until all have or the load has failed.
func (*server) report(ctx context.Context, conn *net.UnixConn, w *Model, ready int) error {
	n := len(w.plan.Tensors)
	for ready < n {
		if err := w.await(ctx, &w.ready, ready); err != nil {
			return tellFailure(ctx, conn, err)
		}
		ready = w.arrivedSince(ready)
		if err := writeMessage(conn, reply{Version: wireVersion, Ready: ready}); err != nil {
			return err
		}
	}
	if err := w.WaitAll(ctx); err != nil {
		return tellFailure(ctx, conn, err)
	}
	return writeMessage(conn, reply{Version: wireVersion, Ready: n, Loaded: true})
}

// tellFailure sends why the load failed, unless it is the client that has gone.
func tellFailure(ctx context.Context, conn *net.UnixConn, err error) error {
	if ctx.Err() != nil {
		return err
	}
	r := errorReply(err)
	r.Version = wireVersion
	return writeMessage(conn, r)
}

// arrivedSince is the number of tensors, from the first on, that have arrived, when the first ready have.
func (w *Model) arrivedSince(ready int) int {
	for ready < len(w.ready.left) && w.ready.left[ready].Load() == 0 {
		ready++
	}
	return ready
}

// enter counts a client of a model. One that is just being opened is waited for.
func (h *Holder) enter(ctx context.Context, name string) (*held, error) {
	m, err := h.await(ctx, name)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return nil, ErrClosed
	case m.dropping:
		return nil, fmt.Errorf("loader: %q: %w", m.name, ErrUnknownModel)
	case m.failed:
		return nil, fmt.Errorf("loader: %q could not be loaded: %w", m.name, m.weights.failure())
	}
	m.attached++
	h.attached++
	return m, nil
}

// leave undoes enter. The last one frees the memory of a load that failed.
func (h *Holder) leave(m *held) {
	h.mu.Lock()
	m.attached--
	free := m.failed && m.attached == 0
	h.mu.Unlock()
	if free {
		h.free(m)
	}
}
