package loader

import (
	"context"
	"errors"
	"time"

	"github.com/gguf2gpu/gguf2gpu/gguf"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
	"github.com/gguf2gpu/gguf2gpu/loader/internal/read"
	"github.com/gguf2gpu/gguf2gpu/loader/plan"
	"github.com/gguf2gpu/gguf2gpu/pinned"
)

// LoadSync puts the tensors of p on the devices the plain way: one thread, one buffer, one copy at a time, each waited
// for. It is the reference that Load is compared with, byte for byte, and the baseline that Load must beat. It shares
// the plan and the kernels with Load, and nothing of its pipeline. What Config says of threads, streams and reading has
// no effect, and it is always the CPU that converts.
func (l *Loader) LoadSync(ctx context.Context, p *Plan, r Request) (*Model, error) {
	began := time.Now()
	if err := l.begin(ctx, p); err != nil {
		return nil, err
	}
	defer l.running.Done()
	if err := p.suits(r, true); err != nil {
		return nil, err
	}
	limit := l.limit()
	m, _, by, err := l.prepare(ctx, limit, p, r, began, DequantCPU)
	if err != nil {
		return nil, err
	}
	s := &syncLoad{Loader: l, model: m, file: p.file, request: r, limit: limit}
	for _, part := range m.parts {
		if kernels := by.of(part.group); kernels != nil {
			s.proof = &proof{loader: l, part: part, kernels: kernels}
		}
		if err := s.load(ctx, part); err != nil {
			err = onDevice(part.on[0].device, len(m.parts) > 1, err)
			if s.stuck {
				m.hangs(part)
			}
			return nil, errors.Join(err, m.free(limit))
		}
	}
	err = m.check(ctx, p.file)
	if err == nil {
		err = m.report.prove(by)
	}
	if err != nil {
		return nil, errors.Join(err, m.free(limit))
	}
	m.report.Total = time.Since(began)
	for _, part := range m.parts {
		part.ready.expect(nil)
		part.issued.expect(nil)
	}
	close(m.finished)
	return m, nil
}

// syncLoad is one call of LoadSync.
type syncLoad struct {
	*Loader
	model   *Model
	file    *gguf.File
	request Request
	limit   *watch.Limit
	stuck   bool  // a copy may still be under way
	done    int64 // bytes of tensors that have arrived

	// Of the group that is being loaded.

	part    *part
	stage   *stage
	buf     *pinned.Buffer
	inspect *inspector
	proof   *proof // nil: nothing is proved
	round   *round // likewise
	scratch []byte
	report  groupReport
}

// load loads one group.
func (s *syncLoad) load(ctx context.Context, part *part) (err error) {
	g := part.group
	if len(g.Tensors) == 0 {
		return nil
	}
	all, err := sizesOf(s.model.plan, s.config, false, nil)
	if err != nil {
		return err
	}
	z := all[part.index]
	z.streams, z.scratch, z.staging = 1, 0, int64(z.chunk)
	pinning := time.Now()
	if s.stage, err = s.takeStage(ctx, s.limit, part.devices(), z, false); err != nil {
		return err
	}
	defer func() {
		if err != nil && !s.stuck {
			s.stuck = !atRest(s.limit, s.stage.idle) || !atRest(s.limit, s.proof.idle)
		}
		err = errors.Join(err, s.proof.close(s.limit, err != nil, s.stuck),
			s.giveBack(s.limit, s.stage, err != nil, s.stuck))
	}()
	if s.buf, err = s.stage.pool.Acquire(ctx); err != nil {
		return err
	}
	defer func() {
		if !s.stuck {
			s.buf.Release()
		}
	}()
	start := time.Now()
	s.part, s.inspect = part, newInspector(g, s.request, part.hashes)
	stats := s.stage.pool.Stats()
	s.report = groupReport{
		devices: g.Devices, streams: 1, threads: 1, chunk: s.stage.chunkBytes(z),
		pinned: stats.PinnedBytes, pin: start.Sub(pinning), pinTotal: stats.TotalPin,
	}
	chunks := piecesOf(g, s.report.chunk)
	if s.proof != nil {
		if s.round, err = s.proof.begin(ctx, s.limit, chunks); err != nil {
			return err
		}
	}
	for i := range chunks {
		if err := s.chunk(ctx, i, &chunks[i]); err != nil {
			return err
		}
	}
	s.report.transfer = time.Since(start)
	if s.proof != nil {
		if s.stuck, err = s.report.proving(ctx, s.limit, s.model, s.proof); err != nil {
			return err
		}
	}
	if s.report.read.Mapped = int64(g.ReadBytes); s.file.Remote() {
		s.report.read, s.report.connections = read.Stats{Remote: int64(g.ReadBytes)}, 1
	}
	s.model.report.add(&s.report)
	return nil
}

// piecesOf cuts the tensors of a group into chunks of one piece each, of at most so many bytes in the file and on the
// device.
func piecesOf(g *plan.Group, most int) (all []plan.Chunk) {
	for i := range g.Tensors {
		t := &g.Tensors[i]
		src, dst := t.Block()
		for off := int64(0); off < t.Size; {
			n := min(int(t.Size-off)/src, most/max(src, dst)) // blocks
			seg := plan.Segment{Tensor: i, Src: off, SrcBytes: n * src, DstBytes: n * dst}
			at := t.DeviceOffset + g.TensorOffset(&seg)
			all = append(all, plan.Chunk{
				Arena: t.Arena, Offset: at, Bytes: n * dst, Delivered: n * dst, Segs: []plan.Segment{seg},
			})
			off += int64(n * src)
		}
	}
	return all
}

// chunk loads chunk i of the group.
func (s *syncLoad) chunk(ctx context.Context, i int, c *plan.Chunk) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	seg := &c.Segs[0]
	t := &s.part.group.Tensors[seg.Tensor]
	out := s.buf.Bytes()[:c.Bytes]
	if err := s.fill(ctx, seg.Tensor, t, seg.Src, seg.SrcBytes, out); err != nil {
		return err
	}
	if s.round != nil {
		x := s.round.of(i)[0].travel
		s.round.write(x, x.at, out)
	}
	for k := range s.part.on {
		stream := s.stage.outlets[k].streams[0]
		to := s.part.ptr(k, c.Arena, c.Offset)
		err := watch.Call(ctx, s.limit, "copying", func() error {
			err := s.buf.CopyToDevice(stream, to, len(out))
			if err == nil {
				err = s.round.travelled(k, stream, i, to)
			}
			if err == nil {
				err = stream.Synchronize()
			}
			return err
		})
		if err != nil {
			s.stuck = s.stuck || watch.Lost(err)
			op := opOf("copy", err)
			err = onDevice(s.part.on[k].device, len(s.part.on) > 1, err)
			return &TensorError{
				Tensor: t.Name, Op: op, Offset: int64(s.part.group.TensorOffset(seg)), Bytes: len(out), Err: err,
			}
		}
		if !s.buf.Pinned() {
			s.report.unpinned++
		}
	}
	read.LetGo(s.file, t, seg.Src, seg.SrcBytes)
	s.report.upload += uint64(len(out))
	s.done += int64(len(out))
	if s.request.Progress != nil {
		s.request.Progress(s.done, int64(s.model.plan.TensorBytes()))
	}
	return nil
}

// fill reads n bytes of tensor i from byte off on and puts what becomes of them into out.
func (s *syncLoad) fill(ctx context.Context, i int, t *plan.Tensor, off int64, n int, out []byte) error {
	data, err := read.Tensor(ctx, s.file, &s.scratch, t, off, n)
	if err == nil {
		err = s.file.Guard(func() error {
			if err := s.inspect.see(i, off, data); err != nil {
				return err
			}
			if t.Target == t.Type {
				copy(out, data)
				return nil
			}
			return s.kernelsOfCPU.Dequantize(out, t.Target, data, t.Type)
		})
	}
	if _, named := errors.AsType[*TensorError](err); named || err == nil {
		return err
	}
	return &TensorError{Tensor: t.Name, Op: "read", Offset: off, Bytes: n, Err: err}
}
