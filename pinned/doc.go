// Package pinned keeps a bounded pool of equal, page-locked staging buffers for copies between host and device.
//
// The pool is the only bound on the host memory of whatever streams through it: [Pool.Acquire] waits while every buffer
// is in use, and so slows down the whole pipeline to the speed of the copies. [New] says for which devices a pool is
// made. Any number of goroutines may share it, and each buffer may go to one of these devices, to some or to all.
//
// # The life of a buffer
//
//	free --Acquire--> owned --Release------> free
//	                        --ReleaseAfter-> in flight --the copies end--> free
//
// Between Acquire and release a buffer belongs to who acquired it: Bytes is filled, CopyToDevice and CopyToHost start
// copies. Release gives back a buffer that no copy uses. [Buffer.ReleaseAfter] gives it back behind the copies that
// were started; it becomes free when these have ended, never before, and then the [Completion] that was named is told.
// Every release names its own Completion, so several users of one pool hear of their own buffers only.
//
// A *Buffer stands for one acquisition. Releasing it twice, or using it after its release, is a mistake of the program
// and panics with a message that names the mistake, even when the memory has another owner by then. A slice that Bytes
// returned cannot be watched in this way: do not keep it.
//
// # Buffers that are lost
//
// ReleaseAfter may fail, because a stream's event cannot be recorded. Then nobody can tell when the copies have ended,
// so the buffer is lost: it stays out of use until the pool is closed. The same holds for a buffer that the device
// writes to when its event cannot be asked. A lost buffer is never given to anybody else; when all are lost, Acquire
// returns [ErrExhausted] instead of waiting for ever.
//
// # Closing
//
// [Pool.Close] waits for the copies in flight and frees everything. A device that hangs makes it wait for ever, in the
// pool or inside HIP, so where that may happen call [Pool.CloseContext] with a deadline. When the deadline comes first,
// a [*LeftError] says how many bytes are left; they are freed in the background if the device comes back.
// [Pool.Abandon] gives up on the device for good: nothing is freed any more.
//
// Close cannot see copies that the pool does not watch: those of lost buffers, of buffers that are still owned, and
// those whose Completion was told an error, since the device may be working on them all the same. The streams of such
// copies must be at rest before Close. A stream is at rest when it was queried and is done, or when closing it
// succeeded. A query that fails proves nothing. If a stream does not come to rest, call Abandon.
//
// # Cost
//
// Pinning is slow: hipHostMalloc takes 0.15 to 0.6 s per GiB. So a pool that needs it starts with a few buffers, and
// pins the others in the background while the first are in use already. Touching huge pages and registering them takes
// a fifth of that time. Where huge pages can be had, the pool makes all its buffers at once, since registering in the
// background disturbed the copies by more than it saved. Where memory cannot be pinned (locked-memory limits,
// containers), the pool makes do with fewer buffers, then with smaller ones, and at last with plain memory, and logs
// that once.
//
// The buffer that became free last is given out first, because its memory is the likeliest to be in a cache still.
package pinned
