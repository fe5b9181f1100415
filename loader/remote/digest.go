package remote

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"hash/crc64"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
)

// Digests says which files are compared with their digests.
type Digests uint8

// DigestsAuto compares files whose names are their digests: those of registries. A load of a share of the model does
// not fetch the rest to compare it.
const (
	DigestsAuto   Digests = iota
	DigestsAlways         // whatever a digest is known of, all of it
	DigestsNever
)

const (
	// maxKept is how many bytes that came too early are kept in memory for the digest, which needs them in order.
	maxKept = 64 << 20
	// checkedRange is how many bytes a range of a file should have whose digest is checked: the 32 ranges that are read
	// at the same time by default then fit maxKept.
	checkedRange = 2 << 20
	// pieceBytes is in what pieces they are kept.
	pieceBytes = 256 << 10
	// smallHole is how many bytes that nobody reads are fetched at once, so that the digest can go on.
	smallHole = 1 << 20
	// fewCores is up to how many cores reading waits for hashing. A core hashes what two or three read over TLS.
	fewCores = 4
	// patience is how long reading waits for hashing that does not move.
	patience = 2 * time.Second
	// fetchers is how many ranges are read at the same time for the digest, when the load is over.
	fetchers = 8
)

// nvme is the polynomial of CRC-64/NVME, of the NVM Express specification, in the form that package crc64 takes.
const nvme = 0x9a6c9329ac4bc9b5

var digestsNames = []string{DigestsAuto: "auto", DigestsAlways: "always", DigestsNever: "never"}

// String returns "auto", "always" or "never".
func (d Digests) String() string {
	if int(d) < len(digestsNames) {
		return digestsNames[d]
	}
	return fmt.Sprintf("Digests(%d)", uint8(d))
}

// UnmarshalText reads what String returns, in upper or lower case.
func (d *Digests) UnmarshalText(text []byte) error {
	i := slices.Index(digestsNames, strings.ToLower(string(text)))
	if i < 0 {
		return fmt.Errorf("%.100q: allowed are %s", text, strings.Join(digestsNames, ", "))
	}
	*d = Digests(i)
	return nil
}

// parseDigest returns the hash function of a digest, and what it should return.
func parseDigest(digest string) (hash.Hash, []byte, error) {
	algorithm, digits, _ := strings.Cut(digest, ":")
	sum, err := hex.DecodeString(digits)
	switch {
	case err != nil || digits != strings.ToLower(digits):
	case algorithm == "sha256" && len(sum) == sha256.Size:
		return sha256.New(), sum, nil
	case algorithm == "sha512" && len(sum) == sha512.Size:
		return sha512.New(), sum, nil
	case algorithm == "crc64nvme" && len(sum) == crc64.Size:
		return crc64.New(crc64.MakeTable(nvme)), sum, nil
	}
	return nil, nil, fmt.Errorf("%.160q is no digest: use sha256:, sha512: or crc64nvme: and hexadecimal digits", digest)
}

// failure is the first wrong digest among the files of a model. It ends reading all of them.
type failure struct{ err atomic.Pointer[error] }

func (f *failure) get() error {
	if err := f.err.Load(); err != nil {
		return *err
	}
	return nil
}

func (f *failure) set(err error) { f.err.CompareAndSwap(nil, &err) }

// digester computes the digest of a file of which ranges are read in any order. Bytes that come in order are hashed, by
// a goroutine of its own; those that come too early are kept, up to maxKept. Of what is too much, or was never read,
// the digester reads what it needs when the load is over.
type digester struct {
	path  string
	want  string
	size  int64
	sum   []byte // that want says
	fetch func(ctx context.Context, off, n int64) io.ReadCloser
	fails *failure
	limit int // maxKept, or less in tests
	// patient: who reads waits a little where bytes would have to be given up. That is for few cores, which hashing and
	// reading share: to read again would take more of them. With many, nobody waits for the digest.
	patient bool

	ended atomic.Bool // it is clear whether the digest is right
	done  chan struct{}

	mu      sync.Mutex
	wake    sync.Cond // something has changed
	hash    hash.Hash // used by whoever has set running
	running bool      // a goroutine is hashing
	at      int64     // the bytes before are hashed, or about to be
	moved   time.Time // when at was last moved
	kept    []piece   // by offset; all behind at
	bytes   int       // in kept
	reading map[*watched]struct{}
	checks  int   // calls of check, which fill all holes
	filling int64 // the end of the hole that is being fetched; 0: none is
	fetched int64 // bytes that were read for the digest alone
	err     error // wrong digest; once ended
	stop    context.CancelFunc
	ctx     context.Context // of the digester: ends when the file is closed
	hashing sync.WaitGroup
}

// piece is some bytes of a file.
type piece struct {
	off int64
	b   []byte
}

func (p piece) end() int64 { return p.off + int64(len(p.b)) }

var pieces = sync.Pool{New: func() any { return new([pieceBytes]byte) }}

// newDigester returns a digester for s. want must have been parsed before.
func newDigester(s gguf.Source, want string, fails *failure) *digester {
	d := &digester{
		path: s.Path(), want: want, size: s.Size(), fetch: s.Range, fails: fails, limit: maxKept,
		done: make(chan struct{}), reading: make(map[*watched]struct{}), patient: runtime.GOMAXPROCS(0) <= fewCores,
	}
	d.hash, d.sum, _ = parseDigest(want)
	d.wake.L = &d.mu
	d.ctx, d.stop = context.WithCancel(context.Background())
	return d
}

// add takes the bytes of p, which are the digester's from now on.
func (d *digester) add(p piece) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.await(p)
	if p.end() <= d.at || d.ended.Load() || d.ctx.Err() != nil {
		recycle(p.b)
		return
	}
	i, _ := slices.BinarySearchFunc(d.kept, p.off, func(q piece, off int64) int {
		return cmp.Compare(q.off, off)
	})
	later := p.off > d.at                                        // else it is hashed at once, and needs no room
	for later && len(d.kept) > i && d.bytes+len(p.b) > d.limit { // those behind it are needed later
		d.evict(len(d.kept) - 1)
	}
	if later && d.bytes+len(p.b) > d.limit {
		recycle(p.b)
	} else {
		d.kept = slices.Insert(d.kept, i, p)
		d.bytes += len(p.b)
	}
	d.kick()
}

// await waits until there is room for p, as long as hashing goes on. It does so for pieces that are read at the same
// time as what is hashed: others, such as those of another load of the same file, will not be needed for long. d.mu is
// held.
func (d *digester) await(p piece) {
	for d.patient && p.off > d.at && p.off-d.at < 2*int64(d.limit) && d.bytes+len(p.b) > d.limit &&
		!d.ended.Load() && d.ctx.Err() == nil {
		left := patience - time.Since(d.moved)
		if left <= 0 {
			return // who reads what comes next may wait for something that this reader has
		}
		t := time.AfterFunc(left, func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.wake.Broadcast()
		})
		d.wake.Wait()
		t.Stop()
	}
}

func (d *digester) evict(i int) {
	d.bytes -= len(d.kept[i].b)
	recycle(d.kept[i].b)
	d.kept = slices.Delete(d.kept, i, i+1)
}

func recycle(b []byte) {
	if cap(b) == pieceBytes {
		pieces.Put((*[pieceBytes]byte)(b[:pieceBytes]))
	}
}

// kick starts hashing if there is something to hash. d.mu is held.
func (d *digester) kick() {
	d.wake.Broadcast()
	if !d.running && !d.ended.Load() && d.ctx.Err() == nil && (d.ready() || d.at == d.size || d.hole() > 0) {
		d.running = true
		d.hashing.Go(d.run)
	}
}

// ready drops what has been hashed already, and reports whether the next bytes are there. d.mu is held.
func (d *digester) ready() bool {
	for len(d.kept) > 0 && d.kept[0].end() <= d.at {
		d.evict(0)
	}
	return len(d.kept) > 0 && d.kept[0].off <= d.at
}

// hole is the number of bytes that stop the digest although nobody reads them, if these are few; else 0. d.mu is held.
func (d *digester) hole() int64 {
	if len(d.kept) == 0 || d.kept[0].off-d.at > smallHole || d.checks > 0 {
		return 0
	}
	for w := range d.reading {
		if w.from <= d.at && d.at < w.end {
			return 0
		}
	}
	return d.kept[0].off - d.at
}

// run hashes as long as there is something to hash.
func (d *digester) run() {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer func() { d.running = false; d.wake.Broadcast() }()
	for d.ctx.Err() == nil && d.at < d.size {
		switch hole := int64(0); {
		case d.ready():
			p := d.kept[0]
			d.kept = slices.Delete(d.kept, 0, 1)
			d.bytes -= len(p.b)
			next := p.b[d.at-p.off:]
			next = next[:min(int64(len(next)), d.size-d.at)]
			d.at, d.moved = d.at+int64(len(next)), time.Now()
			d.mu.Unlock()
			d.hash.Write(next)
			recycle(p.b)
			d.mu.Lock()
			d.wake.Broadcast()
		default:
			if hole = d.hole(); hole == 0 || !d.fill(hole) {
				return
			}
		}
	}
	if d.at == d.size && d.ctx.Err() == nil {
		d.decide()
	}
}

// fill reads and hashes n bytes that nobody reads. d.mu is held, but not while it reads. If that fails, Check tries
// again.
func (d *digester) fill(n int64) bool {
	b := make([]byte, n)
	at := d.at
	d.filling = at + n
	d.mu.Unlock()
	r := d.fetch(d.ctx, at, n)
	_, err := io.ReadFull(r, b)
	_ = r.Close()
	d.mu.Lock()
	d.filling = 0
	if err != nil {
		return false
	}
	d.fetched += n
	d.at += n
	d.hash.Write(b)
	return true
}

// decide compares the digest. d.mu is held.
func (d *digester) decide() {
	if d.err = compareDigest(d.path, d.want, d.hash.Sum(nil), d.sum); d.err != nil {
		d.fails.set(d.err)
	}
	d.ended.Store(true)
	for len(d.kept) > 0 {
		d.evict(len(d.kept) - 1)
	}
	close(d.done)
}

// check reads what is missing, and returns what the comparison said.
func (d *digester) check(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.wake.Broadcast()
	})()
	d.mu.Lock()
	d.checks++
	d.kick() // also an empty file has a digest
	d.mu.Unlock()
	m := new(missing)
	var wg sync.WaitGroup
	for range fetchers {
		wg.Go(func() {
			if err := d.fetchMissing(ctx, m); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	d.mu.Lock()
	d.checks--
	d.mu.Unlock()
	select {
	case <-d.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-d.ctx.Done():
		return errClosed
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// missing says how far those have come who fetch what is missing. It is under the digester's lock.
type missing struct {
	next   int64 // the first byte that none of them has taken
	taking int   // how many are fetching
}

// fetchMissing reads what is missing, in turns with others that call it with the same m, until the digest is computed.
func (d *digester) fetchMissing(ctx context.Context, m *missing) error {
	for {
		off, n := d.claim(ctx, m)
		if n == 0 {
			return nil
		}
		err := d.fetchPieces(ctx, off, n)
		d.mu.Lock()
		m.taking--
		d.fetched += n
		d.wake.Broadcast()
		d.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// fetchPieces reads n bytes at off.
func (d *digester) fetchPieces(ctx context.Context, off, n int64) error {
	r := d.fetch(ctx, off, n)
	for end := off + n; off < end; {
		buf := pieces.Get().(*[pieceBytes]byte)
		b := buf[:min(pieceBytes, end-off)]
		if _, err := io.ReadFull(r, b); err != nil {
			_ = r.Close()
			return err
		}
		d.add(piece{off, b})
		off += int64(len(b))
	}
	return r.Close()
}

// claim waits for bytes to fetch, and takes them for the caller. n is 0 when there are no more.
func (d *digester) claim(ctx context.Context, m *missing) (off, n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	window := int64(d.limit / 2)
	for ctx.Err() == nil && d.ctx.Err() == nil && !d.ended.Load() {
		m.next = max(m.next, d.at, d.filling)
		i := slices.IndexFunc(d.kept, func(p piece) bool { return p.end() > m.next })
		if i >= 0 && d.kept[i].off <= m.next {
			m.next = d.kept[i].end()
			continue
		}
		n = min(checkedRange, window, d.size-m.next)
		if i >= 0 {
			n = min(n, d.kept[i].off-m.next)
		}
		switch {
		case n > 0 && m.next+n <= d.at+window:
			off = m.next
			m.next += n
			m.taking++
			return off, n
		case m.taking == 0 && !d.running && !d.ready(): // what was taken or kept was given up again
			m.next = d.at
		default:
			d.wake.Wait()
		}
	}
	return 0, 0
}

// close ends hashing. Nobody may be reading any more.
func (d *digester) close() {
	d.stop()
	d.hashing.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.kept) > 0 {
		d.evict(len(d.kept) - 1)
	}
}
