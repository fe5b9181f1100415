package loader

import (
	"errors"
	"sync"

	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/internal/watch"
)

// thing is something that is to be freed.
type thing struct {
	device *amdhip.Device
	free   func() error
	what   LeftError // what is left if it is not freed
}

// sum is what all things are together.
func sum(things []thing) (all LeftError) {
	for i := range things {
		all.add(things[i].what)
	}
	return all
}

// freeAll frees things: those of one device one after the other, and all devices at the same time, so that a device
// that hangs does not keep the others from giving back what they have. It returns within the limit, and says what is
// not free by then; the freeing goes on. doing names it. err is what HIP said.
func freeAll(limit *watch.Limit, doing string, things []thing) (left LeftError, err error) {
	of := make(map[*amdhip.Device][]thing)
	for _, x := range things {
		of[x.device] = append(of[x.device], x)
	}
	var mu sync.Mutex
	var errs []error
	var ending sync.WaitGroup
	for _, list := range of {
		ending.Go(func() {
			remaining := list
			err, ended := limit.Free(doing, func() (err error) {
				for _, x := range list {
					err = errors.Join(err, x.free())
					mu.Lock()
					remaining = remaining[1:]
					mu.Unlock()
				}
				return err
			})
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
			if !ended {
				left.add(sum(remaining))
			}
		})
	}
	ending.Wait()
	mu.Lock()
	defer mu.Unlock()
	return left, errors.Join(errs...)
}
