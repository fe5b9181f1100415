package hold

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/gguf2gpu/gguf2gpu/amdhip/soft"
)

// TestBadHolder lets the other side answer attach with what no Holder should.
func TestBadHolder(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{}).with(t, "", sample)
	held, err := h.find("")
	if err != nil {
		t.Fatal(err)
	}
	good := frameOf(t, reply{Version: wireVersion, Manifest: held.now.manifest, Loaded: true})
	change := func(from, to string) string {
		if !strings.Contains(good, from) {
			t.Fatalf("the manifest has no %s", from)
		}
		return string(framed([]byte(strings.Replace(good[4:], from, to, 1))))
	}
	before := h.soft.Stats()
	for what, tt := range map[string]struct{ sent, want string }{
		"nothing":               {"", "gone"},
		"half a message":        {good[:100], "unexpected EOF"},
		"no manifest":           {frameOf(t, reply{Version: 2}), "no manifest"},
		"an empty manifest":     {frameOf(t, reply{Version: wireVersion, Manifest: new(manifest)}), "no file"},
		"too long a message":    {"\x7f\x00\x00\x00", "limit"},
		"an error":              {frameOf(t, errorReply(ErrAttached)), ErrAttached.Error()},
		"no files":              {change(`"files":[`, `"files":[],"were":[`), "no file"},
		"a relative file":       {change(`"path":"/`, `"path":"`), "absolute"},
		"a hash of no hash":     {change(`"header_sha256":"`, `"header_sha256":"x`), "SHA-256"},
		"files of another size": {change(`"file_bytes":`, `"file_bytes":1`), "files of"},
		"fewer tensors":         {change(`"model_tensors":40`, `"model_tensors":39`), "39"},
		"a handle of no size":   {change(`"handle":"`, `"handle":"AAAA`), "IPC handle"},
		"a handle of nothing":   {change(`"handle":"c29mdGd`, `"handle":"c29mdGe`), "hipIpcOpenMemHandle"},
		"no devices":            {change(`"devices":[`, `"devices":[],"were":[`), "0 devices"},
		"another device":        {change(`"kind":"soft"`, `"kind":"cuda"`), `no kind "cuda"`},
		"no such device":        {change(`"uuid":"`, `"uuid":"x`), "not among"},
		"too many devices":      {change(`"index":0`, `"index":64`), "64"},
		"a wild device":         {change(`"index":0`, `"index":1024`), "device number"},
		"a negative device":     {change(`"index":0`, `"index":-1`), "device number"},
		"memory elsewhere":      {change(`"allocations":[{"device":0`, `"allocations":[{"device":1`), "on device 1"},
		"memory nowhere":        {change(`"allocations":[{"device":0`, `"allocations":[{"device":-1`), "on device -1"},
		"endless memory":        {change(`,"bytes":`, `,"bytes":99999999999`), "allocations of more than"},
		"a group elsewhere":     {change(`"groups":[{"devices":[0]`, `"groups":[{"devices":[1]`), "on device 1"},
		"a group nowhere":       {change(`"groups":[{"devices":[0]`, `"groups":[{"devices":[]`), "a group of 0"},
		"a group twice":         {change(`"groups":[`, `"groups":[{"devices":[0]},`), "2 groups of 1 devices"},
		"another policy":        {change(`"policy":"f16"`, `"policy":"f15"`), "unknown"},
		"another type":          {change(`"target":"F16"`, `"target":"F15"`), "not the name"},
		"blocks as a target":    {change(`"target":"F16"`, `"target":"Q8_0"`), "cannot become"},
		"integers as a target":  {change(`"target":"F16"`, `"target":"I16"`), "cannot become"},
		"another allocation":    {change(`"allocation":0`, `"allocation":1`), "not in allocation"},
		"no allocation":         {change(`"allocation":0`, `"allocation":-1`), "not in allocation"},
		"an odd place":          {change(`"at":0`, `"at":1`), "no multiple"},
		"a wrong order":         {change(`"at":0`, `"at":512`), "before the end"},
		"another part":          {change(`"part":0`, `"part":1`), "not in file"},
		"a negative offset":     {change(`"part":0,"offset":`, `"part":0,"offset":-`), "not in file"},
		"another shape":         {change(`"shape":[`, `"shape":[2,`), "elements"},
		"a huge shape":          {change(`"shape":[`, `"shape":[9223372036854775807,`), "overflows"},
		"many dimensions":       {change(`"shape":[`, `"shape":[1,1,1,1,1,1,1,1,`), "dimensions"},
		"a long name":           {change(`{"name":"rope`, `{"name":"`+strings.Repeat("x", 1020)+`rope`), "limit is 1024"},
		"a name twice":          {change(`{"name":"rope_freqs.weight`, `{"name":"token_embd.weight`), "twice"},
		"a slice of nothing":    {change(`"shape":[`, `"slice":{"dim":0},"shape":[`), "without a range"},
		"a slice elsewhere":     {change(`"shape":[`, `"slice":{"dim":7,"ranges":[[0,1]]},"shape":[`), "dimension 7"},
		"an odd slice":          {change(`"shape":[`, `"slice":{"dim":0,"ranges":[[1,0]]},"shape":[`), "ascending"},
		"another slice":         {change(`"shape":[`, `"slice":{"dim":0,"ranges":[[0,16]]},"shape":[`), "elements"},
		"another share":         {change(`"world":1`, `"world":-1`), "world"},
		"another split":         {change(`"split":"layer"`, `"split":"row"`), "unknown"},
		"a model without name":  {change(`"manifest":{"name":"tiny-llama"`, `"manifest":{"name":""`), "name"},
	} {
		to := AttachOptions{
			Open: opener(t), Socket: answering(t, func(conn net.Conn, _ request) { _, _ = io.WriteString(conn, tt.sent) }),
		}
		a, err := Attach(t.Context(), to)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", what, err, tt.want)
		}
		if err == nil {
			mustClose(t, a)
		}
	}
	if now := h.soft.Stats(); now != before {
		t.Errorf("the Holder has %+v, before that %+v", now, before)
	}
}

// TestHalfReply lets the other side hang in the middle of a reply: the first one, and one about the load.
func TestHalfReply(t *testing.T) {
	t.Parallel()
	h := hold(t, Options{}, soft.Options{}).with(t, "", sample)
	held, err := h.find("")
	if err != nil {
		t.Fatal(err)
	}
	good := frameOf(t, reply{Version: wireVersion, Manifest: held.now.manifest, Ready: 1})
	hang := func(sent string) AttachOptions {
		socket := answering(t, func(conn net.Conn, _ request) {
			_, _ = io.WriteString(conn, sent)
			_, _ = conn.Read(make([]byte, 1)) // until the other side goes
		})
		return AttachOptions{Open: opener(t), messageTime: 50 * time.Millisecond, Socket: socket}
	}
	if _, err := Attach(t.Context(), hang(good[:100])); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the first reply: %v", err)
	}
	for _, n := range []int{1, 4, 100} { // in its length, behind it, and in its text
		a, err := Attach(t.Context(), hang(good+good[:n]))
		if err != nil {
			t.Fatal(err)
		}
		<-a.Gone()
		if err := a.WaitAll(t.Context()); !errors.Is(err, ErrGone) || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a later reply, after %d bytes: %v", n, err)
		}
		mustClose(t, a)
	}
}
