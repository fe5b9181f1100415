package hold

import (
	"context"
	"net"
	"time"
)

const (
	// rejoinFirst and rejoinMost are how long to wait between two looks for another Holder, at first and later.
	rejoinFirst = 10 * time.Millisecond
	rejoinMost  = 2 * time.Second
)

// rejoin waits for a Holder that has adopted the memory, and tells it that it is in use. False: this side leaves.
func (a *Attached) rejoin() bool {
	a.mu.Lock()
	_ = a.conn.Close() // it has ended
	a.conn = nil
	a.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-a.quit:
			cancel()
		case <-ctx.Done():
		}
	}()
	for wait := rejoinFirst; ; wait = min(2*wait, rejoinMost) {
		select {
		case <-a.quit:
			return false
		case <-time.After(wait):
		}
		if conn := a.tryRejoin(ctx); conn != nil {
			a.mu.Lock()
			defer a.mu.Unlock()
			if a.leaving.Load() {
				_ = conn.Close()
				return false
			}
			a.conn = conn
			return true
		}
	}
}

// tryRejoin asks the Holder at the socket, if there is one, for the residence that this process has. Nil: it does not
// know it.
func (a *Attached) tryRejoin(ctx context.Context) *net.UnixConn {
	conn, err := dial(ctx, a.socket)
	if err != nil {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	q := request{Op: "attach", Model: a.Info.Name, Residence: a.residence}
	r, files, err := ask(ctx, conn, q, silentTime, a.messageTime, nil)
	closeAll(files)
	if !stop() || err != nil || r.Manifest == nil || r.Manifest.Residence != a.residence {
		_ = conn.Close()
		return nil
	}
	return conn
}
