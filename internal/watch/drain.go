package watch

import (
	"fmt"
	"time"
)

// unsureTime is how long Drain goes on asking after a query has failed. A copy takes milliseconds, so that work which
// is not known to have ended by then may never be.
const unsureTime = 2 * time.Second

// Drain asks by query whether some work has ended until it has, or until the deadline. It polls, since a wait inside of
// the runtime could not be given up. rest reports whether nothing of the work is under way any more; err is the first
// error of query, or matches ErrStalled if the deadline came first.
//
// A query that fails says nothing about the work, unless stopped says that this error ends it. So after another one
// Drain asks again, and after two seconds gives up: then the work counts as being under way.
func Drain(query func() (done bool, err error), stopped func(error) bool, deadline time.Time) (rest bool, err error) {
	var failed error
	began := time.Now()
	for wait := 20 * time.Microsecond; ; wait = min(2*wait, longest(time.Since(began))) {
		done, err := query()
		if err != nil && failed == nil {
			failed = err
			if unsure := time.Now().Add(unsureTime); unsure.Before(deadline) {
				deadline = unsure
			}
		}
		switch {
		case err != nil && stopped(err), done:
			return true, failed
		case time.Now().After(deadline) && failed != nil:
			return false, fmt.Errorf("%w: nobody can tell whether a copy has ended: %w", ErrStalled, failed)
		case time.Now().After(deadline):
			return false, fmt.Errorf("%w: a copy does not end; the device or its driver hangs (see the kernel's log)", ErrStalled)
		}
		time.Sleep(wait)
	}
}

// longest is how long to sleep at most between two queries, after so much time: work that takes long takes longer.
func longest(since time.Duration) time.Duration {
	if since > time.Second {
		return 10 * time.Millisecond
	}
	return time.Millisecond
}
