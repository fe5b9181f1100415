package hold

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// pair is two ends of a connection.
func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends []*net.UnixConn
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		ends = append(ends, c.(*net.UnixConn))
	}
	return ends[0], ends[1]
}

// FuzzKeeper sends a keeper anything, with a descriptor or without. It answers or closes the connection, keeps no more
// than what it was given descriptors of, and leaves no descriptor open.
func FuzzKeeper(f *testing.F) {
	for _, s := range []string{
		``, `{}`, `{"version":1,"op":"keep","id":"a","description":{"x":[1]}}`, `{"version":1,"op":"forget","id":"a"}`,
		`{"version":1,"op":"kept"}`, `{"version":2,"op":"kept"}`, `{"version":1,"op":"keep","id":"","description":null}`, `[]`,
	} {
		f.Add(framed([]byte(s)), true)
		f.Add(framed([]byte(s)), false)
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, '{'}, true)
	f.Fuzz(func(t *testing.T, b []byte, with bool) {
		ours, theirs := pair(t)
		read, write, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		var rights []byte
		if with {
			rights = unix.UnixRights(int(write.Fd()))
		}
		if len(b) == 0 {
			b = []byte{0}
		}
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			if n, _, err := ours.WriteMsgUnix(b, rights, nil); err == nil && n < len(b) {
				_, _ = ours.Write(b[n:]) // the keeper may have had enough
			}
			_ = ours.CloseWrite() // likewise
		}()
		k := newKeeper(slog.New(slog.DiscardHandler), 4096)
		k.serve(theirs)
		theirs.Close()
		<-sent
		ours.Close()
		for _, x := range k.kept {
			if !with || len(x.Files) != 1 || x.ID == "" || !json.Valid(append(bytes.Clone(x.Description), ' ')) &&
				x.Description != nil {
				t.Errorf("it keeps %+v", x)
			}
			closeAll(x.Files)
		}
		write.Close()
		if n, err := read.Read(make([]byte, 1)); n > 0 || err == nil { // the end of the pipe: nobody has the other one
			t.Errorf("somebody has written to the pipe: %v", err)
		}
		read.Close()
	})
}

// FuzzDescription reads what a keeper says of a model.
func FuzzDescription(f *testing.F) {
	for devices, s := range specs() {
		m, _ := manifestOf(f, s, devices)
		b, err := json.Marshal(description{
			Version: wireVersion, Manifest: m, Rules: []string{"attn=f32"}, Tensors: "^blk",
			Ratio: []float64{1, 0, 2, 0, 3}[:2*devices-1], Prints: true,
		})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"version":3,"manifest":{},"tensors":"((a{1000}){1000}){1000}","rules":["(=f16"]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var d description
		if json.Unmarshal(b, &d) != nil || d.Manifest == nil {
			return
		}
		p, err := d.Manifest.plan()
		if err != nil {
			return
		}
		s, err := d.spec(p.Spec)
		if err == nil && len(s.Rules) != len(d.Rules) {
			t.Errorf("%d rules of %d", len(s.Rules), len(d.Rules))
		}
		if n := len(s.Split.Ratio); err == nil && n > 0 && len(s.Split.Among(n)) == p.Devices {
			wide, err := widen(p, s, s.Split.Among(n), n)
			if err == nil && (wide.Devices != n || wide.Len() != p.Len() || wide.DeviceBytes() != p.DeviceBytes()) {
				t.Errorf("%d tensors on %d devices became %d on %d, want %d", p.Len(), p.Devices, wide.Len(), wide.Devices, n)
			}
		}
		seen := make(map[string]bool)
		for i := range p.Groups {
			checkGroup(t, &p.Groups[i], seen)
		}
	})
}
