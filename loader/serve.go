package loader

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

const (
	// requestTime is how long a client may take to say what it wants.
	requestTime = 10 * time.Second
	// sendTime is how long a client may take to receive a message. One that does not read is let go.
	sendTime = 10 * time.Second
	// maxClients bounds the connections that are served at the same time.
	maxClients = 1024
)

// Serve answers those who connect to l, a Unix socket, until ctx ends. Then nobody is let in any more, and it returns once all
// attached processes have gone, or after grace, when their connections are closed. A client that dies, hangs or does not speak
// the protocol loses its connection and nothing else happens. Serve closes l.
func (h *Holder) Serve(ctx context.Context, l *net.UnixListener, grace time.Duration) error {
	gone, cut := context.WithCancelCause(context.WithoutCancel(ctx)) // ends when connections are to be closed
	defer cut(nil)
	stop := context.AfterFunc(ctx, func() { _ = l.Close() }) // Accept tells
	defer stop()
	slots := make(chan struct{}, maxClients)
	err := h.accept(ctx, gone, l, slots)
	if ctx.Err() == nil {
		cut(err)
		h.clients.Wait()
		return errors.Join(err, l.Close())
	}
	idle := make(chan struct{})
	go func() { h.clients.Wait(); close(idle) }()
	select {
	case <-idle:
	case <-time.After(grace):
		h.log.Warn("closing the connections of processes that are still attached", "after", grace)
		cut(ErrClosed)
		<-idle
	}
	return nil
}

// accept serves connections until ctx ends or accepting fails for good.
func (h *Holder) accept(ctx, gone context.Context, l *net.UnixListener, slots chan struct{}) error {
	for pause := time.Millisecond; ; {
		conn, err := l.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = conn.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil: // too many open files, mostly: it passes
			h.log.Warn("accepting a connection failed", "error", err)
			pause = min(2*pause, time.Second)
			time.Sleep(pause)
			continue
		}
		pause = time.Millisecond
		select {
		case slots <- struct{}{}:
		default:
			h.refuse(conn, fmt.Errorf("loader: %d clients are connected already", maxClients))
			continue
		}
		h.clients.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			defer context.AfterFunc(gone, func() { _ = conn.Close() })()
			h.serve(ctx, conn)
		})
	}
}

// refuse tells a client why it is turned away.
func (h *Holder) refuse(conn *net.UnixConn, err error) {
	h.mu.Lock()
	h.refused++
	h.mu.Unlock()
	h.log.Warn("refused a connection", "error", err)
	_ = h.send(conn, errorReply(err)) // it may have gone
	_ = conn.Close()
}

// send sends one reply, in bounded time.
func (h *Holder) send(conn *net.UnixConn, r reply) error {
	r.Version = wireVersion
	if err := conn.SetWriteDeadline(time.Now().Add(sendTime)); err != nil {
		return err
	}
	return writeMessage(conn, r)
}

// serve talks to one client.
func (h *Holder) serve(ctx context.Context, conn *net.UnixConn) {
	if err := checkPeer(conn, h.o.AllowGroup); err != nil {
		h.refuse(conn, err)
		return
	}
	var r request
	err := conn.SetReadDeadline(time.Now().Add(requestTime))
	if err == nil {
		err = readMessage(conn, &r, maxRequest)
	}
	if errors.Is(err, io.EOF) {
		return // somebody looked whether there is a Holder
	}
	if err == nil && r.Version != wireVersion {
		err = fmt.Errorf("loader: version %d of the protocol is asked for, this is version %d", r.Version, wireVersion)
	}
	if err != nil {
		h.refuse(conn, err)
		return
	}
	switch r.Op {
	case "list":
		err = h.send(conn, reply{Models: h.Models()})
	case "add":
		err = h.send(conn, h.answer(h.addAs(ctx, &r)))
	case "drop":
		err = h.send(conn, h.answer(h.Drop(r.Model)))
	case "attach":
		err = h.attach(conn, r.Model)
	default:
		h.refuse(conn, fmt.Errorf("loader: unknown operation %q", r.Op))
	}
	if err != nil {
		h.log.Debug("a client went away", "error", err)
	}
}

// answer is the reply to a request that succeeded or failed.
func (h *Holder) answer(err error) reply {
	if err != nil {
		return errorReply(err)
	}
	return reply{Models: h.Models()}
}

// addAs does what an add request asks for.
func (h *Holder) addAs(ctx context.Context, r *request) error {
	o, err := h.options(r)
	if err != nil {
		return err
	}
	_, err = h.add(ctx, r.Name, r.Model, o)
	return err
}

// attach lets a client use a model for as long as it stays connected.
func (h *Holder) attach(conn *net.UnixConn, name string) error {
	m, err := h.enter(name)
	if err != nil {
		return h.send(conn, errorReply(err))
	}
	defer h.leave(m)
	if err := h.send(conn, reply{Manifest: m.manifest}); err != nil {
		return err
	}
	// A client has nothing more to say: what comes is its end.
	left, leave := context.WithCancel(context.Background())
	defer leave()
	go func() {
		defer leave()
		if conn.SetReadDeadline(time.Time{}) == nil {
			_, _ = conn.Read(make([]byte, 1))
		}
	}()
	if err := h.follow(left, conn, m.weights); err != nil {
		return err
	}
	<-left.Done()
	return nil
}

// follow sends word of tensors that arrive, until all have or the load has failed.
func (h *Holder) follow(ctx context.Context, conn *net.UnixConn, w *Model) error {
	n := len(w.plan.Tensors)
	for ready := 0; ready < n; {
		if err := w.await(ctx, &w.ready, ready); err != nil {
			if ctx.Err() != nil {
				return err
			}
			return h.send(conn, errorReply(err))
		}
		for ready < n && w.ready.left[ready].Load() == 0 {
			ready++
		}
		if err := h.send(conn, reply{Ready: ready}); err != nil {
			return err
		}
	}
	if err := w.WaitAll(ctx); err != nil {
		return h.send(conn, errorReply(err))
	}
	return h.send(conn, reply{Ready: n, Loaded: true})
}

// enter counts a client of a model.
func (h *Holder) enter(name string) (*held, error) {
	m, err := h.find(name)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed || m.dropping {
		return nil, fmt.Errorf("loader: %q: %w", m.name, ErrUnknownModel)
	}
	m.attached++
	h.attached++
	return m, nil
}

func (h *Holder) leave(m *held) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m.attached--
}
