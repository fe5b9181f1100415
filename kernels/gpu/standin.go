package gpu

import (
	"github.com/gguf2gpu/gguf2gpu/amdhip"
	"github.com/gguf2gpu/gguf2gpu/kernels"
)

// offer gives the software device Go functions that stand in for kernels.
func offer(s amdhip.StandIns, keys []Key) {
	for _, k := range keys {
		run := k.standIn
		if k.Fingerprint {
			run = fingerprintStandIn
		}
		s.Offer(k.Name(), k.params(), run)
	}
}

// params returns how many parameters kernel k has.
func (k Key) params() int {
	if k.Fingerprint {
		return 4
	}
	return 3
}

// standIn does on the CPU what kernel k does on a GPU. It refuses arguments that Launch must not pass to a kernel.
func (k Key) standIn(l *amdhip.KernelCall) amdhip.Status {
	out, in, blocks := amdhip.DevicePtr(l.Args[0]), amdhip.DevicePtr(l.Args[1]), l.Args[2]
	if l.Block.X != Threads || out%Align != 0 || in%Align != 0 || blocks > maxWork {
		return amdhip.ErrInvalidValue
	}
	src, st := l.Memory(in-Padding, blocks*k.inBytes()+2*Padding) // a kernel may read the padding
	if st != amdhip.Success {
		return st
	}
	dst, st := l.Memory(out, blocks*k.outBytes())
	if st != amdhip.Success {
		return st
	}
	cpu, err := kernels.For(kernels.Auto)
	if err == nil {
		err = cpu.Dequantize(dst, k.To, src[Padding:len(src)-Padding], k.From)
	}
	if err != nil {
		return amdhip.ErrInvalidValue // they overlap
	}
	return amdhip.Success
}
