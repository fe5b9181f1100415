package main

import (
	"io"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// bar draws a progress bar with bytes, rate and time left. It is there as soon as the job has said how much there is to
// do, so that it does not begin with zero of zero.
type bar struct {
	w       io.Writer
	label   string
	width   int // of the terminal; 0: unknown
	started time.Time

	pool *mpb.Progress // nil until there is something to draw
	bar  *mpb.Bar
}

func (*bar) interval() time.Duration { return barInterval }

// decorators returns what stands in front of the bar and behind it. On a narrow terminal the numbers come first: the
// share in place of the bytes, and below that no rate.
func (b *bar) decorators() (front, behind []decor.Decorator) {
	const wide, narrow = 64, 36
	speed := decor.NewAverageSpeed(decor.SizeB1000(0), "% .2f ", b.started)
	left := decor.OnComplete(decor.NewAverageETA(decor.ET_STYLE_GO, b.started, nil), "done")
	label := []rune(b.label)
	if most := max(b.width/3, 8); b.width > 0 && len(label) > most {
		label = append(label[:most-1], '…')
	}
	name := decor.Name(string(label) + " ")
	switch {
	case b.width == 0 || b.width >= wide:
		return []decor.Decorator{name, decor.CountersKiloByte("% .2f / % .2f")}, []decor.Decorator{speed, left}
	case b.width >= narrow:
		return []decor.Decorator{name, decor.Percentage()}, []decor.Decorator{speed, left}
	}
	return []decor.Decorator{name, decor.Percentage()}, nil
}

// begin draws the bar for the first time.
func (b *bar) begin() {
	// The caller has decided that a bar is wanted, whatever w is.
	o := []mpb.ContainerOption{
		mpb.WithOutput(rawStream(b.w)), mpb.ForceTTY(), mpb.WithAutoRefresh(), mpb.WithRefreshRate(barInterval),
	}
	if b.width > 0 && terminalWidth(b.w) == 0 {
		o = append(o, mpb.WithWidth(b.width))
	}
	b.pool = mpb.New(o...)
	if c, ok := b.w.(*console); ok { // other lines are written above the bar
		c.showBar(b.pool)
	}
	front, behind := b.decorators()
	b.bar = b.pool.AddBar(0, mpb.PrependDecorators(front...), mpb.AppendDecorators(behind...))
}

func (b *bar) update(done, total int64, _ time.Duration) {
	if total <= 0 {
		return
	}
	if b.pool == nil {
		b.begin()
	}
	b.bar.SetTotal(total, false)
	b.bar.SetCurrent(done)
}

func (b *bar) end(done, total int64, elapsed time.Duration, aborted bool) {
	b.update(done, total, elapsed)
	if b.pool == nil {
		return // it never began
	}
	if aborted {
		b.bar.Abort(false)
	} else {
		b.bar.SetTotal(total, true)
	}
	b.pool.Wait() // until the last state is drawn
	if c, ok := b.w.(*console); ok {
		c.showBar(nil)
	}
}
