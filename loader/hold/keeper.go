package hold

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// The protocol between a Holder and a keeper process, version 1. Messages are framed as those of Holders: a length and
// a JSON object. A client sends one [keeperRequest] of at most 64 MiB, within 10 seconds; only the keeper's own user
// may. The keeper answers with [keeperReply] messages, and closes the connection:
//
//   - "keep": the request has id and description, and descriptors as SCM_RIGHTS of its first byte. One reply.
//   - "forget": the request has id. One reply.
//   - "kept": for each model one reply with id, description and its descriptors, and then one with neither.
//
// A reply with error has nothing else.

// keeperVersion is the version of that protocol.
const keeperVersion = 1

const (
	// maxKept bounds the models that a keeper has.
	maxKept = 1024
	// maxKeptBytes bounds their descriptions together.
	maxKeptBytes = 256 << 20
	// keeperFiles is how many files a keeper may have open beside the descriptors that it keeps: for connections, and for
	// what comes with requests that are being read. Without them nobody could get the models back.
	keeperFiles = 1024
	// maxKeeperClients bounds the connections that are served at the same time.
	maxKeeperClients = 64
)

type keeperRequest struct {
	Version     int             `json:"version"`
	Op          string          `json:"op"` // "keep", "forget" or "kept"
	ID          string          `json:"id,omitempty"`
	Description json.RawMessage `json:"description,omitempty"`
}

type keeperReply struct {
	Version     int             `json:"version"`
	Error       string          `json:"error,omitempty"`
	ID          string          `json:"id,omitempty"`
	Description json.RawMessage `json:"description,omitempty"`
}

// keeper is a process that has descriptors of device memory, and no runtime.
type keeper struct {
	log  *slog.Logger
	most int // descriptors that are kept

	mu   sync.Mutex
	kept []Kept // in the order in which they came
}

// newKeeper returns a keeper in a process that may have so many files open.
func newKeeper(log *slog.Logger, files int) *keeper {
	return &keeper{log: log, most: max(files/2, files-keeperFiles)}
}

// ServeKeeper keeps models for Holders that connect to l (see Listen) until ctx ends. It opens no runtime, so that
// nothing that a runtime or a driver's library does can end it. log may be nil. What it keeps at the end, nobody has
// any more, but for processes that are attached.
func ServeKeeper(ctx context.Context, l *net.UnixListener, log *slog.Logger) error {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	k := newKeeper(log, openFiles())
	defer func() {
		for _, x := range k.kept {
			closeAll(x.Files)
		}
	}()
	var clients sync.WaitGroup
	defer clients.Wait()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	slots := make(chan struct{}, maxKeeperClients)
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
			log.Warn("accepting a connection failed", "error", err)
			pause = min(2*pause, time.Second)
			time.Sleep(pause)
			continue
		}
		pause = time.Millisecond
		slots <- struct{}{} // each is served in bounded time
		clients.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
			k.serve(conn)
		})
	}
}

// serve talks to one client.
func (k *keeper) serve(conn *net.UnixConn) {
	err := conn.SetDeadline(time.Now().Add(keepTime))
	var from peer
	if err == nil {
		from, err = checkPeer(conn, false)
	}
	var q keeperRequest
	var files []*os.File
	if err == nil {
		files, err = readKeeper(conn, &q)
	}
	if errors.Is(err, io.EOF) {
		return // a look whether somebody listens
	}
	if err == nil && q.Version != keeperVersion {
		err = fmt.Errorf("hold: version %d of the keeper's protocol is asked for, this is version %d", q.Version, keeperVersion)
	}
	if err == nil {
		switch q.Op {
		case "keep":
			if err = k.keep(Kept{ID: q.ID, Description: q.Description, Files: files}); err == nil {
				files = nil
			}
		case "forget":
			k.forget(q.ID)
		case "kept":
			err = k.sendAll(conn)
		default:
			err = fmt.Errorf("hold: unknown operation %.40q", q.Op)
		}
	}
	closeAll(files)
	r := keeperReply{Version: keeperVersion}
	if err != nil {
		r.Error = err.Error()
		k.log.Warn("refused", "pid", from.pid, "error", err)
	}
	_ = writeMessage(conn, r) // who asked may have gone
}

// readKeeper reads a message and the descriptors that come with it.
func readKeeper(conn *net.UnixConn, v any) ([]*os.File, error) {
	n, files, err := readLengthAndFiles(conn, maxReply, func() error { return nil })
	if err == nil {
		err = readBody(conn, v, n)
	}
	if err != nil {
		closeAll(files)
		return nil, err
	}
	return files, nil
}

// keep takes over the files of x.
func (k *keeper) keep(x Kept) error {
	if x.ID == "" || len(x.ID) > 2*maxName || len(x.Files) == 0 {
		return fmt.Errorf("hold: to keep are %d descriptors under the name %.40q", len(x.Files), x.ID)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	sum, files := len(x.Description), len(x.Files)
	for _, have := range k.kept {
		if have.ID != x.ID { // that one is replaced
			sum += len(have.Description)
			files += len(have.Files)
		}
	}
	if files > k.most {
		return fmt.Errorf("hold: %d descriptors would be kept, and of the files that this process may open (ulimit -n) %d are for that",
			files, k.most)
	}
	if len(k.kept) >= maxKept || sum > maxKeptBytes {
		return fmt.Errorf("hold: %d models are kept already, with %d bytes of descriptions", len(k.kept), sum)
	}
	k.remove(x.ID)
	k.kept = append(k.kept, x)
	k.log.Info("keeping", "id", x.ID, "descriptors", len(x.Files), "models", len(k.kept))
	return nil
}

func (k *keeper) forget(id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.remove(id) {
		k.log.Info("gave up", "id", id, "models", len(k.kept))
	}
}

// remove gives up a model. k.mu is held.
func (k *keeper) remove(id string) bool {
	i := slices.IndexFunc(k.kept, func(x Kept) bool { return x.ID == id })
	if i < 0 {
		return false
	}
	closeAll(k.kept[i].Files)
	k.kept = slices.Delete(k.kept, i, i+1)
	return true
}

// sendAll sends all models. They are locked meanwhile, for no longer than the client has time.
func (k *keeper) sendAll(conn *net.UnixConn) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, x := range k.kept {
		r := keeperReply{Version: keeperVersion, ID: x.ID, Description: x.Description}
		if err := writeWithFiles(conn, r, x.Files); err != nil {
			return err
		}
	}
	return nil
}

// KeeperClient is the Keeper that listens on a socket: see ServeKeeper.
type KeeperClient struct {
	Socket string
}

// Keep is Keeper.Keep.
func (c KeeperClient) Keep(ctx context.Context, k Kept) error {
	_, err := c.ask(ctx, keeperRequest{Op: "keep", ID: k.ID, Description: k.Description}, k.Files)
	return err
}

// Forget is Keeper.Forget.
func (c KeeperClient) Forget(ctx context.Context, id string) error {
	_, err := c.ask(ctx, keeperRequest{Op: "forget", ID: id}, nil)
	return err
}

// Kept is Keeper.Kept.
func (c KeeperClient) Kept(ctx context.Context) ([]Kept, error) {
	return c.ask(ctx, keeperRequest{Op: "kept"}, nil)
}

// Instance tells which process the keeper is: by its number, and by when its socket was made. Another one than before
// has lost what was kept.
func (c KeeperClient) Instance(ctx context.Context) (string, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	p, err := checkPeer(conn, false)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(c.Socket)
	if err != nil {
		return "", err
	}
	return fmt.Sprint(p.pid, " ", info.ModTime().UnixNano()), nil
}

// who tells which process it is, for people who wait for it.
func (c KeeperClient) who(ctx context.Context) string {
	conn, err := c.dial(ctx)
	if err != nil {
		return "the keeper"
	}
	defer conn.Close()
	return "the keeper, " + who(conn)
}

func (c KeeperClient) dial(ctx context.Context) (*net.UnixConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.Socket)
	if err != nil {
		if unreachable(err) {
			err = fmt.Errorf("hold: no keeper is there (gguf2gpu hold --keeper --socket %s starts one): %w", c.Socket, err)
		}
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

// ask sends a request and collects the replies.
func (c KeeperClient) ask(ctx context.Context, q keeperRequest, files []*os.File) (all []Kept, err error) {
	defer func() {
		if err != nil {
			for _, k := range all {
				closeAll(k.Files)
			}
			all = nil
		}
	}()
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })()
	if err := conn.SetDeadline(time.Now().Add(keepTime)); err != nil {
		return nil, err
	}
	q.Version = keeperVersion
	// With EPIPE, a reply says why.
	if err := writeWithFiles(conn, q, files); err != nil && !errors.Is(err, syscall.EPIPE) {
		return nil, err
	}
	for {
		var r keeperReply
		got, err := readKeeper(conn, &r)
		switch {
		case err != nil:
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = fmt.Errorf("%s: %w", who(conn), err)
			}
			return all, orCause(ctx, fmt.Errorf("hold: the keeper: %w", err))
		case r.Error != "":
			closeAll(got)
			return all, errors.New(r.Error)
		case r.ID == "":
			closeAll(got)
			return all, nil
		}
		all = append(all, Kept{ID: r.ID, Description: r.Description, Files: got})
		if len(all) > maxKept {
			return all, fmt.Errorf("hold: the keeper has more than %d models", maxKept)
		}
	}
}
