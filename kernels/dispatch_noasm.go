//go:build !amd64 || purego

package kernels

// missing says why tiers above Generic cannot run.
func missing(ISA) string { return "this program was built without assembly kernels" }

// assembly returns the kernels that a tier adds: none here.
func assembly(ISA) *kernelTable { return &kernelTable{} }

// fillKernel returns the kernel that FillNT uses: none here.
func fillKernel(ISA) kernelFunc { return nil }

// fingerprintAssembly returns the assembly of a tier: none here.
func fingerprintAssembly(ISA) fingerprintKernel { return fingerprintKernel{} }
