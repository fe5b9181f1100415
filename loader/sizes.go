package loader

import (
	"fmt"
	"runtime"

	"github.com/gguf2gpu/gguf2gpu/loader/plan"
)

const (
	// minChunk is the least size of a chunk in bytes.
	minChunk = plan.MinChunk
	// maxDefaultThreads bounds the default number of workers of a group. Twelve fill any link of today; more have more
	// buffers under way than fit a cache, and were slower.
	maxDefaultThreads = 12
	// defaultStreams: copies in one direction take turns on the link, so a second stream only hides the gap between two
	// copies, and more make no difference.
	defaultStreams = 2
	// expandStreams is the default where the device converts: each stream has one place for blocks on the device, and the
	// copy of the next ones waits until the kernel has read the last. Meanwhile the other streams keep the link busy.
	expandStreams = 4
	// defaultChunk is the size of a copy from which on the gaps between copies cost little; see README.md.
	defaultChunk = 4 << 20
	// flyingBuffers is how many buffers may be on their way to the device while every worker fills one.
	flyingBuffers = 8
	// largeLoad is the number of device bytes from which on a load is worth larger chunks.
	largeLoad = 4 << 30
	// minDefaultStaging is the default staging memory on machines with few cores.
	minDefaultStaging = 64 << 20
	// maxDefaultStaging bounds the default staging memory on machines with many cores.
	maxDefaultStaging = 128 << 20
	// defaultConnections keeps a fast network busy in spite of its latency: with a round trip of 50 ms and requests of
	// 8 MiB, 32 connections carry 5 GB/s; without latency they carry what a plain download does (README.md).
	defaultConnections = 32
)

// sizes is how large everything is that loads one group.
type sizes struct {
	threads     int   // workers; of a remote model, how many may convert at the same time
	connections int   // workers of a remote model; 0: it is a file
	turns       bool  // groups take turns
	converters  int   // of all workers that may come, how many may convert at the same time: where groups take turns, all
	readers     int   // likewise, how many ranges of a remote model are read at the same time
	streams     int   // of each device
	chunk       int   // bytes of a copy at most
	staging     int64 // bytes of staging memory
	scratch     int   // places for blocks on each device, one for each stream; 0: the device converts nothing
	unstaged    bool  // there is no staging memory: all chunks are copied from an Image
}

// workers is how many workers fill buffers at the same time.
func (z sizes) workers() int {
	if z.connections > 0 {
		return z.readers
	}
	return z.threads
}

// scratchBytes is what the places for blocks take on each device.
func (z sizes) scratchBytes() uint64 { return uint64(z.scratch) * scratchSize(z.chunk) }

// sizesOf decides all sizes of a load: one entry for each group of p. expand says, by group, which tensors the devices
// convert; it may be nil. Whatever is large or small about a load, local or remote, on one device or on several, is
// decided here and nowhere else.
func sizesOf(p *plan.Plan, c Config, remote bool, expand [][]bool) ([]sizes, error) {
	n, loading := 0, 0 // groups that get something: nothing is set aside for the others
	for i := range p.Groups {
		if len(p.Groups[i].Tensors) > 0 {
			n++
		}
	}
	n = max(1, n)
	threads := c.Threads
	if threads == 0 {
		threads = min(runtime.GOMAXPROCS(0), n*maxDefaultThreads)
	}
	connections := 0
	if remote {
		if connections = c.Connections; connections == 0 {
			connections = defaultConnections
		}
	}
	all := make([]sizes, len(p.Groups))
	for i := range all {
		z, share := &all[i], loading%n
		if len(p.Groups[i].Tensors) > 0 {
			loading++
		}
		z.threads, z.connections = max(1, shareOf(threads, share, n)), shareOf(connections, share, n)
		if remote {
			z.connections = max(1, z.connections)
		}
		z.turns = remote && c.turns && n > 1
		if z.converters, z.readers = z.threads, z.connections; z.turns {
			z.converters, z.readers = max(1, threads), connections
		}
		var converts []bool
		if expand != nil {
			converts = expand[i]
		}
		if err := z.memory(&p.Groups[i], c, n, remote, converts); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// shareOf is what the i-th of n has of total; the first ones have one more where it does not divide evenly.
func shareOf(total, i, n int) int {
	share := total / n
	if i < total%n {
		share++
	}
	return share
}

// memory decides chunk, staging and scratch of one of n groups.
func (z *sizes) memory(g *plan.Group, c Config, n int, remote bool, expand []bool) error {
	z.chunk, z.staging = c.Chunk, c.Staging/int64(n)
	open := c.Chunk == 0 && c.Staging == 0
	if c.Chunk == 0 {
		z.chunk = defaultChunk
		if c.Staging > 0 { // at least two chunks, so that filling and copying overlap
			z.chunk = max(minChunk, min(defaultChunk, int(z.staging/2)))
		}
	}
	if c.Staging == 0 {
		if open && !remote && g.DeviceBytes >= largeLoad && mostlyConverted(g, expand) {
			// Larger copies use the link better by a few per cent. Raw loads are bound by the workers, who copy as much as
			// the link does, and lose more by having fewer buffers than they gain.
			z.chunk = 2 * defaultChunk
		}
		z.staging = max(defaultStaging(z.workers(), z.chunk), 2*int64(z.chunk))
	}
	if z.staging < int64(z.chunk) {
		return fmt.Errorf("%w: Staging is %d bytes: %d for each of %d devices do not hold a chunk of %d bytes",
			ErrBadOption, c.Staging, z.staging, n, z.chunk)
	}
	if z.streams = c.Streams; z.streams == 0 {
		z.streams = defaultStreams
	}
	if anyOf(expand) { // all places together take no more than the staging memory does, or one chunk
		if c.Streams == 0 {
			z.streams = expandStreams
		}
		z.streams = max(1, min(z.streams, int(z.staging/int64(z.chunk))))
		z.scratch = z.streams
	}
	bytes := min((g.DeviceBytes+minChunk-1)/minChunk*minChunk, 1<<40) // no more than there is to load
	z.chunk = min(z.chunk, max(minChunk, int(bytes)))
	z.staging = min(z.staging, int64(bytes)+int64(z.chunk)-1)
	return nil
}

// defaultStaging is a buffer for every worker to fill, and some for the link to drain.
func defaultStaging(workers, chunk int) int64 {
	return max(minDefaultStaging, min(maxDefaultStaging, int64(workers+flyingBuffers)*int64(chunk)))
}

// mostlyConverted reports whether the CPU converts most of the group's bytes.
func mostlyConverted(g *plan.Group, expand []bool) bool {
	var raw uint64
	for i := range g.Tensors {
		if t := &g.Tensors[i]; t.Target == t.Type || expand != nil && expand[i] {
			raw += t.Bytes
		}
	}
	return raw < g.DeviceBytes/2
}

// anyOf reports whether one is true.
func anyOf(all []bool) bool { return count(all) > 0 }

// count is how many are true.
func count(all []bool) (n int) {
	for _, b := range all {
		if b {
			n++
		}
	}
	return n
}
