// Package watch gives a time limit to calls that cannot be ended.
//
// A call of the HIP runtime may wait for ever when a device hangs, and nothing can call it back. So it runs in a
// goroutine of its own, and whoever needs its answer stops waiting when the limit is reached. Such a call is lost: its
// goroutine stays until the call returns, if it ever does.
//
// A [Limit] belongs to one operation, such as one load. The first lost call uses up its time: further calls of the same
// operation get only a moment, as they are likely to wait for the same device. So an operation ends shortly after its
// limit, however many calls it makes. [Calls] remembers lost calls beyond that, for the operations that free things.
//
// [Drain] finds out whether work on a stream has ended.
//
// [Waiting] tells which calls are being waited for now, for a program that is told to end.
package watch
