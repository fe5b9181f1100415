package hold

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/gguf2gpu/gguf2gpu/loader"
)

const (
	// requestTime is how long a client may take to say what it wants.
	requestTime = 10 * time.Second
	// sendTime is how long a client may take to receive a message, as long as it uses no memory.
	sendTime = 10 * time.Second
	// maxClients bounds the connections of other users that are served at the same time, and those of this user likewise:
	// others cannot keep the owner from listing and dropping. Where a process may open few files, it is a quarter of
	// them.
	maxClients = 1024
	// endingTime is how long attached processes get to hear that the Holder ends, where that costs them nothing.
	endingTime = 100 * time.Millisecond
	// waitingTime is how long a client waits before it is told for what, and told again.
	waitingTime = 2 * time.Second
)

// Serve answers those who connect to l, a Unix socket (see Listen), until ctx ends. Then nobody is let in any more,
// attached processes are told, and it returns once all of them have gone; after grace it closes their connections.
// Where models are shared by descriptors, it does not wait: those who are attached go on without the Holder. A client
// that dies, hangs or does not speak the protocol loses its connection, and nothing else happens. Serve closes l.
func (h *Holder) Serve(ctx context.Context, l *net.UnixListener, grace time.Duration) error {
	gone, cut := context.WithCancelCause(context.WithoutCancel(ctx)) // its end closes the connections
	defer cut(nil)
	most := min(h.options.maxClients, max(1, openFiles()/4))
	s := &server{Holder: h, ctx: ctx, gone: gone, owners: make(chan struct{}, most), others: make(chan struct{}, most)}
	defer context.AfterFunc(ctx, func() { _ = l.Close() })() // Accept then fails
	err := s.accept(l)
	if ctx.Err() == nil {
		cut(err)
		s.clients.Wait()
		return errors.Join(err, l.Close())
	}
	s.mu.Lock()
	s.ending = true
	s.mu.Unlock()
	if h.share == ShareFD { // who is attached has the memory without the Holder, too
		grace = min(grace, endingTime)
	}
	idle := make(chan struct{})
	go func() { s.clients.Wait(); close(idle) }()
	select {
	case <-idle:
	case <-time.After(grace):
		if h.share != ShareFD {
			h.log.Warn("closing the connections of processes that are still attached", "after", grace)
		}
		cut(loader.ErrClosed)
		<-idle
	}
	return nil
}

// server is one call of Serve.
type server struct {
	*Holder
	ctx, gone context.Context // the end of accepting, and that of the connections
	clients   sync.WaitGroup

	// Places for connections, of this user and of others.

	owners, others chan struct{}
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
		from, err := s.options.peer(conn, s.options.AllowGroup)
		if err != nil {
			s.refuse(conn, err)
			_ = conn.Close()
			continue
		}
		slots := s.others
		if from.owner {
			slots = s.owners
		}
		select {
		case slots <- struct{}{}:
		default:
			s.refuse(conn, fmt.Errorf("hold: %d clients are connected already", cap(slots)))
			_ = conn.Close()
			continue
		}
		s.clients.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			defer context.AfterFunc(s.gone, func() { _ = conn.Close() })()
			s.serve(conn, from)
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
func (s *server) serve(conn *net.UnixConn, from peer) {
	var r request
	err := conn.SetReadDeadline(time.Now().Add(s.options.requestTime))
	if err == nil {
		stop := context.AfterFunc(s.ctx, func() { _ = conn.SetReadDeadline(time.Now()) }) // nobody is let in after that
		err = readMessage(conn, &r, maxRequest)
		if !stop() {
			err = fmt.Errorf("hold: the holder is ending: %w", loader.ErrClosed)
		}
	}
	if errors.Is(err, io.EOF) {
		return // a look whether somebody listens
	}
	switch {
	case err != nil:
	case r.Version != wireVersion:
		err = fmt.Errorf("hold: version %d of the protocol is asked for, this is version %d", r.Version, wireVersion)
	case r.Op != "list" && r.Op != "attach" && !from.owner:
		err = fmt.Errorf("hold: process %d belongs to another user, and may not %s models: %w", from.pid, r.Op, os.ErrPermission)
	}
	if err != nil {
		s.refuse(conn, err)
		return
	}
	switch r.Op {
	case "list":
		err = s.send(conn, reply{Models: s.Models()})
	case "add":
		err = s.change(conn, &r, s.addAs)
	case "drop":
		err = s.change(conn, &r, func(context.Context, *request) error { return s.Drop(r.Model) })
	case "sleep":
		err = s.change(conn, &r, func(ctx context.Context, r *request) error { return s.Sleep(ctx, r.Model) })
	case "wake":
		err = s.change(conn, &r, func(ctx context.Context, r *request) error { return s.Wake(ctx, r.Model) })
	case "pin":
		err = s.change(conn, &r, func(context.Context, *request) error { return s.Pin(r.Model) })
	case "unpin":
		err = s.change(conn, &r, func(context.Context, *request) error { return s.Unpin(r.Model) })
	case "attach":
		err = s.attach(conn, from, &r)
	default:
		s.refuse(conn, fmt.Errorf("hold: unknown operation %q", r.Op))
	}
	if err != nil {
		s.log.Debug("a client went away", "pid", from.pid, "error", err)
	}
}

// change does what a request asks for, and answers it.
func (s *server) change(conn *net.UnixConn, r *request, f func(context.Context, *request) error) error {
	var failed error
	if err := s.patiently(conn, r.Model, func(ctx context.Context) { failed = f(ctx, r) }); err != nil {
		return err
	}
	if failed != nil {
		return s.send(conn, errorReply(failed))
	}
	return s.send(conn, reply{Models: s.Models()})
}

// patiently runs f, which is about a model. Every two seconds the client is told what it waits for. When that fails, it
// has gone: then f's context ends, and the error says so.
func (s *server) patiently(conn *net.UnixConn, model string, f func(context.Context)) error {
	ctx, cancel := context.WithCancel(s.gone)
	defer cancel()
	done := make(chan struct{})
	go func() { defer close(done); f(ctx) }()
	tick := time.NewTicker(waitingTime)
	defer tick.Stop()
	var gone error
	for {
		select {
		case <-done:
			return gone
		case <-tick.C:
			if gone == nil {
				if gone = s.send(conn, reply{Waiting: s.waitsFor(model)}); gone != nil {
					cancel()
				}
			}
		}
	}
}

// waitsFor says what somebody who wants something of a model waits for.
func (h *Holder) waitsFor(name string) string {
	all, err := h.meant(name)
	if err != nil {
		return "the holder"
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range all {
		if what := h.comingOf(m); what != "" {
			return what
		}
	}
	return fmt.Sprintf("model %q, which somebody else puts to sleep or drops", all[0].name)
}

// comingOf says what is going on with m; "" if nothing is known. h.mu is held.
func (h *Holder) comingOf(m *held) string {
	switch {
	case m.coming && h.awaited != "" && slices.ContainsFunc(h.freeing, func(n uint64) bool { return n > 0 }):
		return fmt.Sprintf("model %q, for which memory has to be given up by %s", m.name, h.awaited)
	case !m.isOpen():
		return fmt.Sprintf("model %q, which is being opened", m.name)
	case m.coming:
		return fmt.Sprintf("model %q, for which room is made in device memory", m.name)
	case m.now != nil && !m.now.finished:
		return fmt.Sprintf("model %q, which is being loaded: %d of %d tensors have arrived", m.name, m.now.arrivals.tensors(), m.plan.Len())
	case m.imaging != nil:
		return fmt.Sprintf("model %q, whose file is being copied to page-locked memory", m.name)
	}
	return ""
}

// addAs does what an add request asks for.
func (s *server) addAs(ctx context.Context, r *request) error {
	if !filepath.IsAbs(r.Path) && !s.options.opens(r.Path) {
		return fmt.Errorf("%w: %q as a path: it must be absolute, or a name that this holder can open", loader.ErrBadOption, r.Path)
	}
	spec, err := s.specOf(r)
	if err != nil {
		return err
	}
	_, err = s.add(ctx, r.Model, r.Path, spec, s.options.requestOfOthers())
	return err
}

// attach lets a client use a model for as long as it stays connected.
func (s *server) attach(conn *net.UnixConn, from peer, q *request) error {
	var m *held
	var r *residence
	var refused error
	gone := s.patiently(conn, q.Model, func(ctx context.Context) {
		if q.Residence != "" {
			m, r, refused = s.rejoin(q.Residence)
		} else {
			m, r, refused = s.enter(ctx, q)
		}
	})
	switch {
	case refused != nil:
		return errors.Join(gone, s.send(conn, errorReply(refused)))
	case gone != nil:
		s.leave(m, r)
		return gone
	}
	s.log.Info("attached", "model", m.name, "pid", from.pid, "again", q.Residence != "")
	s.tell()
	defer func() {
		s.leave(m, r)
		s.log.Info("detached", "model", m.name, "pid", from.pid)
		s.tell()
	}()
	now, further := r.arrivals.get()
	first := reply{Version: wireVersion, Manifest: r.manifest, Ready: now.tensors, Loaded: now.loaded()}
	files := r.memory.files()
	if q.Residence != "" {
		files = nil
	}
	if err := conn.SetWriteDeadline(time.Now().Add(sendTime)); err != nil {
		return err
	}
	if err := writeWithFiles(conn, first, files); err != nil {
		return err
	}
	// From here on the client may have the memory mapped, so it counts until it is gone, even if it hangs and reads
	// nothing.
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	connected, disconnect := context.WithCancel(s.gone)
	defer disconnect()
	var listening sync.WaitGroup
	defer listening.Wait() // its read ends with the connection
	defer conn.Close()
	listening.Go(func() {
		defer disconnect()
		_, _ = conn.Read(make([]byte, 1)) // returns when the client goes, or says more than it may
		_ = conn.Close()                  // ends the sending of a message that the client does not read
	})
	if now.loaded() {
		further = nil
	}
	return s.report(connected, conn, r, further)
}

// report tells a client how the load goes on whenever further is closed, until it has ended, and when the Holder is
// about to end. It returns when the client has gone.
func (s *server) report(ctx context.Context, conn *net.UnixConn, m *residence, further <-chan struct{}) error {
	ending := s.ctx.Done()
	for {
		var r reply
		select {
		case <-further:
			var now arrival
			now, further = m.arrivals.get()
			r = reply{Ready: now.tensors, Loaded: now.loaded()}
			if now.err != nil {
				r = errorReply(now.err)
			}
			if now.ended {
				further = nil
			}
		case <-ending:
			ending = nil
			r = reply{Ending: true}
		case <-ctx.Done():
			return nil
		}
		r.Version = wireVersion
		if err := writeMessage(conn, r); err != nil {
			return err
		}
	}
}

// enter counts a client of a model. One that is being opened is waited for; one that sleeps is woken.
func (h *Holder) enter(ctx context.Context, q *request) (*held, *residence, error) {
	m, err := h.partFor(q.Model, q.Rank, q.World)
	if err == nil {
		m, err = h.await(ctx, m.name)
	}
	if err != nil {
		return nil, nil, err
	}
	for {
		r, err := h.enterNow(m)
		if r != nil || err != nil {
			return m, r, err
		}
		if _, err := h.wake(ctx, m); err != nil {
			return nil, nil, err
		}
	}
}

// enterNow is enter for a model in device memory; nil: it is not there.
func (h *Holder) enterNow(m *held) (*residence, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := m.now
	switch {
	case h.closed || h.ending:
		return nil, loader.ErrClosed
	case m.dropping:
		return nil, fmt.Errorf("hold: %q: %w", m.name, ErrUnknownModel)
	case r == nil || r.err != nil && m.loaded:
		return nil, nil
	case r.err != nil:
		return nil, fmt.Errorf("hold: %q could not be loaded: %w", m.name, r.err)
	}
	m.attached++
	h.attached++
	h.touch(m)
	return r, nil
}

// rejoin counts a client that has the memory of a residence already.
func (h *Holder) rejoin(residence string) (*held, *residence, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.models {
		if r := m.now; r != nil && r.id == residence && r.finished && r.err == nil && !m.dropping && !h.closed && !h.ending {
			m.attached++
			h.attached++
			h.touch(m)
			return m, r, nil
		}
	}
	return nil, nil, fmt.Errorf("hold: the residence %.40q: %w", residence, ErrUnknownModel)
}

// leave undoes enter. The last client's leaving frees the memory of a load that failed.
func (h *Holder) leave(m *held, r *residence) {
	h.mu.Lock()
	m.attached--
	h.touch(m)
	free := r.err != nil && m.attached == 0
	h.notify()
	h.mu.Unlock()
	if free {
		h.free(m, r)
	}
}
