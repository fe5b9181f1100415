package amdhip

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unsafe"

	"github.com/gguf2gpu/gguf2gpu/amdhip/internal/hip"
)

// prototypes are the parameters of the entry points in C. They stand between AMD's headers and the symbol tables and
// are compared with both. Functions of hipRTC return hiprtcResult, those that end with Name or String text, the others
// hipError_t. NAMES is a type that HIP 7 made constant.
var prototypes = map[string]string{
	"hipRuntimeGetVersion":       "int*",
	"hipDriverGetVersion":        "int*",
	"hipGetDeviceCount":          "int*",
	"hipSetDevice":               "int",
	"hipGetDevice":               "int*",
	"hipDeviceGetName":           "char*, int, hipDevice_t",
	"hipDeviceGetPCIBusId":       "char*, int, int",
	"hipDeviceGetAttribute":      "int*, hipDeviceAttribute_t, int",
	"hipDeviceTotalMem":          "size_t*, hipDevice_t",
	"hipMemGetInfo":              "size_t*, size_t*",
	"hipMalloc":                  "void**, size_t",
	"hipFree":                    "void*",
	"hipHostMalloc":              "void**, size_t, unsigned",
	"hipHostFree":                "void*",
	"hipHostRegister":            "void*, size_t, unsigned",
	"hipHostUnregister":          "void*",
	"hipHostGetDevicePointer":    "void**, void*, unsigned",
	"hipDeviceSynchronize":       "void",
	"hipMemcpyAsync":             "void*, const void*, size_t, hipMemcpyKind, hipStream_t",
	"hipMemsetAsync":             "void*, int, size_t, hipStream_t",
	"hipStreamCreateWithFlags":   "hipStream_t*, unsigned",
	"hipStreamDestroy":           "hipStream_t",
	"hipStreamSynchronize":       "hipStream_t",
	"hipStreamQuery":             "hipStream_t",
	"hipStreamWaitEvent":         "hipStream_t, hipEvent_t, unsigned",
	"hipEventCreateWithFlags":    "hipEvent_t*, unsigned",
	"hipEventDestroy":            "hipEvent_t",
	"hipEventRecord":             "hipEvent_t, hipStream_t",
	"hipEventQuery":              "hipEvent_t",
	"hipEventSynchronize":        "hipEvent_t",
	"hipEventElapsedTime":        "float*, hipEvent_t, hipEvent_t",
	"hipGetDeviceProperties":     "hipDeviceProp_t*, int",
	"hipDeviceGetUuid":           "hipUUID*, hipDevice_t",
	"hipMallocAsync":             "void**, size_t, hipStream_t",
	"hipFreeAsync":               "void*, hipStream_t",
	"hipDeviceCanAccessPeer":     "int*, int, int",
	"hipDeviceEnablePeerAccess":  "int, unsigned",
	"hipDeviceDisablePeerAccess": "int",
	"hipMemcpyPeerAsync":         "void*, int, const void*, int, size_t, hipStream_t",
	"hipIpcGetMemHandle":         "hipIpcMemHandle_t*, void*",
	"hipIpcOpenMemHandle":        "void**, hipIpcMemHandle_t, unsigned",
	"hipIpcCloseMemHandle":       "void*",
	"hipModuleLoadData":          "hipModule_t*, const void*",
	"hipModuleUnload":            "hipModule_t",
	"hipModuleGetFunction":       "hipFunction_t*, hipModule_t, const char*",
	"hipModuleLaunchKernel": "hipFunction_t, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, " +
		"hipStream_t, void*[], void**",
	"hipMemGetAddressRange":          "void**, size_t*, void*",
	"hipMemGetAllocationGranularity": "size_t*, const hipMemAllocationProp*, hipMemAllocationGranularity_flags",
	"hipMemCreate": "hipMemGenericAllocationHandle_t*, size_t, const hipMemAllocationProp*, " +
		"unsigned long long",
	"hipMemRelease":        "hipMemGenericAllocationHandle_t",
	"hipMemAddressReserve": "void**, size_t, size_t, void*, unsigned long long",
	"hipMemAddressFree":    "void*, size_t",
	"hipMemMap":            "void*, size_t, size_t, hipMemGenericAllocationHandle_t, unsigned long long",
	"hipMemUnmap":          "void*, size_t",
	"hipMemSetAccess":      "void*, size_t, const hipMemAccessDesc*, size_t",
	"hipMemExportToShareableHandle": "ANY*, hipMemGenericAllocationHandle_t, hipMemAllocationHandleType, " +
		"unsigned long long",
	"hipMemImportFromShareableHandle": "hipMemGenericAllocationHandle_t*, void*, hipMemAllocationHandleType",
	"hipStreamBeginCapture":           "hipStream_t, hipStreamCaptureMode",
	"hipStreamEndCapture":             "hipStream_t, hipGraph_t*",
	"hipGraphDestroy":                 "hipGraph_t",
	"hipGraphInstantiate":             "hipGraphExec_t*, hipGraph_t, hipGraphNode_t*, char*, size_t",
	"hipGraphLaunch":                  "hipGraphExec_t, hipStream_t",
	"hipGraphExecDestroy":             "hipGraphExec_t",

	"hiprtcCreateProgram":     "hiprtcProgram*, const char*, const char*, int, NAMES, NAMES",
	"hiprtcCompileProgram":    "hiprtcProgram, int, NAMES",
	"hiprtcGetProgramLogSize": "hiprtcProgram, size_t*",
	"hiprtcGetProgramLog":     "hiprtcProgram, char*",
	"hiprtcGetCodeSize":       "hiprtcProgram, size_t*",
	"hiprtcGetCode":           "hiprtcProgram, char*",
	"hiprtcDestroyProgram":    "hiprtcProgram*",
	"hiprtcGetErrorString":    "hiprtcResult",
	"hipGetErrorName":         "hipError_t",
	"hipGetErrorString":       "hipError_t",
}

// goTypes says how the table writes the C types.
var goTypes = map[string]reflect.Type{
	"int": reflect.TypeFor[int32](), "hipDevice_t": reflect.TypeFor[int32](), "unsigned": reflect.TypeFor[uint32](),
	"size_t": reflect.TypeFor[uintptr](), "void*": reflect.TypeFor[uintptr](), "const void*": reflect.TypeFor[uintptr](),
	"hipStream_t": reflect.TypeFor[uintptr](), "hipEvent_t": reflect.TypeFor[uintptr](),
	"hipMemcpyKind": reflect.TypeFor[hip.MemcpyKind](), "hipDeviceAttribute_t": reflect.TypeFor[hip.DeviceAttribute](),
	"hipError_t": reflect.TypeFor[Status](), "hipIpcMemHandle_t": reflect.TypeFor[IPCHandle](),
	"int*": reflect.TypeFor[*int32](), "char*": reflect.TypeFor[*byte](), "float*": reflect.TypeFor[*float32](),
	"size_t*": reflect.TypeFor[*uintptr](), "void**": reflect.TypeFor[*uintptr](),
	"hipStream_t*": reflect.TypeFor[*uintptr](),
	"hipEvent_t*":  reflect.TypeFor[*uintptr](), "hipIpcMemHandle_t*": reflect.TypeFor[*IPCHandle](),
	"hipDeviceProp_t*": reflect.TypeFor[*byte](), "hipUUID*": reflect.TypeFor[*[16]byte](),
	"hipModule_t": reflect.TypeFor[uintptr](), "hipModule_t*": reflect.TypeFor[*uintptr](),
	"hipFunction_t": reflect.TypeFor[uintptr](), "hipFunction_t*": reflect.TypeFor[*uintptr](),
	"hiprtcProgram": reflect.TypeFor[uintptr](), "hiprtcProgram*": reflect.TypeFor[*uintptr](),
	"hiprtcResult": reflect.TypeFor[RTCStatus](), "const char*": reflect.TypeFor[string](),
	"unsigned long long": reflect.TypeFor[uint64](), "ANY*": reflect.TypeFor[*int32](), // void*: a descriptor goes there
	"hipMemGenericAllocationHandle_t":   reflect.TypeFor[uintptr](),
	"hipMemGenericAllocationHandle_t*":  reflect.TypeFor[*uintptr](),
	"const hipMemAllocationProp*":       reflect.TypeFor[*hip.AllocationProp](),
	"const hipMemAccessDesc*":           reflect.TypeFor[*hip.AccessDesc](),
	"hipMemAllocationHandleType":        reflect.TypeFor[hip.HandleType](),
	"hipMemAllocationGranularity_flags": reflect.TypeFor[hip.Granularity](),
	"hipStreamCaptureMode":              reflect.TypeFor[hip.CaptureMode](),
	"hipGraph_t":                        reflect.TypeFor[uintptr](), "hipGraph_t*": reflect.TypeFor[*uintptr](),
	"hipGraphExec_t": reflect.TypeFor[uintptr](), "hipGraphExec_t*": reflect.TypeFor[*uintptr](),
	"hipGraphNode_t*": reflect.TypeFor[*uintptr](),
	"NAMES":           reflect.TypeFor[**byte](), "void*[]": reflect.TypeFor[*unsafe.Pointer](),
}

// resultOf returns what the function returns, in C and in the symbol table.
func resultOf(name string) (string, reflect.Type) {
	switch {
	case strings.HasSuffix(name, "ErrorName"), strings.HasSuffix(name, "ErrorString"):
		return "const char*", reflect.TypeFor[string]()
	case strings.HasPrefix(name, "hiprtc"):
		return "hiprtcResult", reflect.TypeFor[RTCStatus]()
	}
	return "hipError_t", reflect.TypeFor[Status]()
}

// headerConstants are C expressions and what this package takes them for.
var headerConstants = map[string]any{
	"hipMemcpyHostToHost": hip.MemcpyHostToHost, "hipMemcpyHostToDevice": hip.MemcpyHostToDevice,
	"hipMemcpyDeviceToHost": hip.MemcpyDeviceToHost, "hipMemcpyDeviceToDevice": hip.MemcpyDeviceToDevice,
	"hipMemcpyDefault":                       hip.MemcpyDefault,
	"hipDeviceAttributeAsyncEngineCount":     hip.AttrAsyncEngineCount,
	"hipDeviceAttributeCanMapHostMemory":     hip.AttrCanMapHostMemory,
	"hipDeviceAttributeIntegrated":           hip.AttrIntegrated,
	"hipDeviceAttributeMultiprocessorCount":  hip.AttrMultiprocessorCount,
	"hipDeviceAttributePciBusId":             hip.AttrPCIBusID,
	"hipDeviceAttributePciDeviceId":          hip.AttrPCIDeviceID,
	"hipDeviceAttributePciDomainID":          hip.AttrPCIDomainID,
	"hipDeviceAttributeTotalGlobalMem":       hip.AttrTotalGlobalMem,
	"hipDeviceAttributeWarpSize":             hip.AttrWarpSize,
	"hipDeviceAttributeMemoryPoolsSupported": hip.AttrMemoryPoolsSupported,
	"hipHostMallocPortable":                  hip.HostMallocPortable,
	"hipHostMallocMapped":                    hip.HostMallocMapped,
	"hipHostMallocNumaUser":                  hip.HostMallocNumaUser,
	"hipHostMallocCoherent":                  hip.HostMallocCoherent,
	"hipHostMallocNonCoherent":               hip.HostMallocNonCoherent,
	"hipHostRegisterPortable":                hip.HostRegisterPortable,
	"hipHostRegisterMapped":                  hip.HostRegisterMapped,
	"hipStreamNonBlocking":                   hip.StreamNonBlocking,
	"hipEventDefault":                        hip.EventDefault,
	"hipEventBlockingSync":                   hip.EventBlockingSync,
	"hipEventDisableTiming":                  hip.EventDisableTiming,
	"hipEventInterprocess":                   hip.EventInterprocess,

	"hipStreamCaptureModeGlobal":      hip.CaptureGlobal,
	"hipStreamCaptureModeThreadLocal": hip.CaptureThreadLocal,
	"hipStreamCaptureModeRelaxed":     hip.CaptureRelaxed,

	"sizeof(hipIpcMemHandle_t)":                  unsafe.Sizeof(IPCHandle{}),
	"sizeof(hipUUID)":                            16,
	"sizeof(hipError_t)":                         unsafe.Sizeof(Status(0)),
	"sizeof(hiprtcResult)":                       unsafe.Sizeof(RTCStatus(0)),
	"sizeof(hipMemcpyKind)":                      unsafe.Sizeof(hip.MemcpyKind(0)),
	"sizeof(hipDeviceAttribute_t)":               unsafe.Sizeof(hip.DeviceAttribute(0)),
	"offsetof(hipDeviceProp_t, name)":            0,
	"sizeof(((hipDeviceProp_t*)0)->name)":        hip.PropNameSize,
	"sizeof(((hipDeviceProp_t*)0)->gcnArchName)": hip.PropNameSize,
	"hipIpcMemLazyEnablePeerAccess":              "(HIP_VERSION_MAJOR >= 6 ? 1 : 0)",
}

// virtualConstants are headerConstants for HIP 5.7 and later: hipMemAllocationProp had another layout before.
var virtualConstants = map[string]any{
	"hipDeviceAttributeVirtualMemoryManagementSupported":              hip.AttrVirtualMemory,
	"hipMemLocationTypeDevice":                                        hip.LocationDevice,
	"hipMemAllocationTypePinned":                                      hip.AllocationPinned,
	"hipMemHandleTypeNone":                                            hip.HandleNone,
	"hipMemHandleTypePosixFileDescriptor":                             hip.HandleDescriptor,
	"hipMemAllocationGranularityMinimum":                              hip.GranularityMinimum,
	"hipMemAllocationGranularityRecommended":                          hip.GranularityRecommended,
	"hipMemAccessFlagsProtNone":                                       hip.AccessNone,
	"hipMemAccessFlagsProtRead":                                       hip.AccessRead,
	"hipMemAccessFlagsProtReadWrite":                                  hip.AccessReadWrite,
	"sizeof(hipMemAllocationProp)":                                    unsafe.Sizeof(hip.AllocationProp{}),
	"offsetof(hipMemAllocationProp, type)":                            unsafe.Offsetof(hip.AllocationProp{}.Type),
	"offsetof(hipMemAllocationProp, HANDLES)":                         unsafe.Offsetof(hip.AllocationProp{}.HandleTypes),
	"offsetof(hipMemAllocationProp, location)":                        unsafe.Offsetof(hip.AllocationProp{}.Location),
	"offsetof(hipMemAllocationProp, win32HandleMetaData)":             unsafe.Offsetof(hip.AllocationProp{}.Win32),
	"offsetof(hipMemAllocationProp, allocFlags)":                      unsafe.Offsetof(hip.AllocationProp{}.Compression),
	"offsetof(hipMemAllocationProp, allocFlags.gpuDirectRDMACapable)": unsafe.Offsetof(hip.AllocationProp{}.RDMA),
	"offsetof(hipMemAllocationProp, allocFlags.usage)":                unsafe.Offsetof(hip.AllocationProp{}.Usage),
	"sizeof(hipMemAccessDesc)":                                        unsafe.Sizeof(hip.AccessDesc{}),
	"offsetof(hipMemAccessDesc, location)":                            unsafe.Offsetof(hip.AccessDesc{}.Location),
	"offsetof(hipMemAccessDesc, flags)":                               unsafe.Offsetof(hip.AccessDesc{}.Flags),
	"offsetof(hipMemLocation, id)":                                    unsafe.Offsetof(hip.Location{}.ID),
	"sizeof(hipMemLocation)":                                          unsafe.Sizeof(hip.Location{}),
}

// propConstants are the layout of a struct of device properties as C expressions.
func propConstants(c string, p hip.PropLayout) map[string]any {
	at := func(field string) string { return fmt.Sprintf("offsetof(%s, %s)", c, field) }
	all := map[string]any{
		"sizeof(" + c + ")": p.Size, at("totalGlobalMem"): p.TotalGlobalMem, at("warpSize"): p.WarpSize,
		at("multiProcessorCount"): p.MultiProcessors, at("integrated"): p.Integrated,
		at("canMapHostMemory"): p.CanMapHost, at("pciDomainID"): p.PCIDomain, at("pciBusID"): p.PCIBus,
		at("gcnArchName"): p.ArchName,
	}
	if p.UUID != 0 {
		all[at("uuid")] = p.UUID
	}
	return all
}

// headerGroups are the constants by the condition under which a version's headers have them.
var headerGroups = []struct {
	condition string
	constants map[string]any
}{
	{"1", headerConstants},
	{"HIP_VERSION >= 50700000", virtualConstants},
	{"HIP_VERSION >= 60100000", map[string]any{"hipMemcpyDeviceToDeviceNoCU": hip.MemcpyDeviceToDeviceNoCU}},
	// HIP 6 gave the new layout the old name, and the old one a name of its own.
	{"HIP_VERSION_MAJOR < 6", propConstants("hipDeviceProp_t", hip.PropR0000)},
	{"HIP_VERSION_MAJOR >= 6", propConstants("hipDeviceProp_t", hip.PropR0600)},
	{"HIP_VERSION_MAJOR >= 6", propConstants("hipDeviceProp_tR0000", hip.PropR0000)},
}

// headerStart is how the C programs begin.
const headerStart = `#include <stdio.h>
#include <stdlib.h>
#include <stddef.h>
#include <hip/hip_version.h>
#include <hip/hip_runtime_api.h>
#include <hip/hiprtc.h>
#if HIP_VERSION_MAJOR >= 6
#include <hip/hip_deprecated.h>
#endif
#if HIP_VERSION_MAJOR >= 7
#define NAMES const char *const *
#define HANDLES requestedHandleTypes // the plural is HIP 7's
#else
#define NAMES const char **
#define HANDLES requestedHandleType
#endif
#define ANY void
static int count, shift;
#define SAME(c, ours) count++; if ((long long)(c) != (long long)(ours) + shift) \
	printf("%s is %lld, we have %lld\n", #c, (long long)(c), (long long)(ours) + shift);
`

// headerTest compiles and runs C programs that include the headers of HIP: those of the machine, or those below the
// directory that the environment variable AMDHIP_INCLUDE names.
type headerTest struct {
	t       *testing.T
	cc      string
	program string
}

func newHeaderTest(t *testing.T) *headerTest {
	t.Helper()
	h := &headerTest{t, compiler(t, "headers"), filepath.Join(t.TempDir(), "headers")}
	if out, err := h.compile("int main(void) { printf(\"%d.%d\", HIP_VERSION_MAJOR, HIP_VERSION_MINOR); }\n"); err != nil {
		require(t, "headers", fmt.Sprintf("the HIP headers cannot be compiled (Debian: libamdhip64-dev): %s", out))
	}
	wantVersion(t, "the headers", string(h.run()))
	return h
}

// compile compiles headerStart and text.
func (h *headerTest) compile(text string) ([]byte, error) {
	source := h.program + ".c"
	check(h.t, os.WriteFile(source, []byte(headerStart+text), 0o644))
	args := []string{"-Werror=incompatible-pointer-types", "-D__HIP_PLATFORM_AMD__"}
	if dir := os.Getenv("AMDHIP_INCLUDE"); dir != "" {
		args = append(args, "-I"+dir)
	}
	return exec.Command(h.cc, append(args, "-I/opt/rocm/include", "-o", h.program, source)...).CombinedOutput()
}

// run runs what was compiled.
func (h *headerTest) run(args ...string) []byte {
	h.t.Helper()
	out, err := exec.Command(h.program, args...).CombinedOutput()
	if err != nil {
		h.t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// TestHeaders compares numbers, layouts and prototypes with those of the HIP headers, through a C program that includes
// them: a constant that differs prints a line, a prototype that differs does not compile. Then all constants are made
// wrong by one, and each must be noticed.
func TestHeaders(t *testing.T) {
	h := newHeaderTest(t)
	var b strings.Builder
	for name, params := range prototypes {
		result, _ := resultOf(name)
		fmt.Fprintf(&b, "%s (*check_%s)(%s);\n", result, name, params)
	}
	b.WriteString("int main(int argc, char **argv) {\nif (argc > 1) shift = atoi(argv[1]);\n")
	for _, group := range headerGroups {
		fmt.Fprintf(&b, "#if %s\n", group.condition)
		for c, ours := range group.constants {
			if _, text := ours.(string); !text {
				ours = fmt.Sprintf("%d", ours)
			}
			fmt.Fprintf(&b, "SAME(%s, %s)\n", c, ours)
		}
		b.WriteString("#endif\n")
	}
	for code, name := range hip.StatusNames {
		fmt.Fprintf(&b, "SAME(%s, %d)\n", name, code)
	}
	for code, name := range hip.RTCNames {
		fmt.Fprintf(&b, "SAME(%s, %d)\n", name, code)
	}
	// sizeof keeps the functions from being linked: the headers are there without the library, too.
	for name := range prototypes {
		fmt.Fprintf(&b, "(void)sizeof(check_%s = %s);\n", name, name)
	}
	b.WriteString("if (shift) printf(\"%d constants\\n\", count);\n}\n")
	if out, err := h.compile(b.String()); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out := h.run(); len(out) > 0 {
		t.Fatalf("%s", out)
	}
	for _, shift := range []string{"1", "-1"} {
		out := strings.TrimSpace(string(h.run(shift)))
		if noticed := strings.Count(out, "\n"); !strings.HasSuffix(out, fmt.Sprintf("\n%d constants", noticed)) {
			t.Errorf("with all constants wrong by %s, the program notices %d of them:\n%s", shift, noticed, out)
		}
	}
}

// TestHeadersNoticePrototypes: a prototype with one parameter too many must not compile, whichever it is.
func TestHeadersNoticePrototypes(t *testing.T) {
	h := newHeaderTest(t)
	var b strings.Builder
	for name, params := range prototypes {
		result, _ := resultOf(name)
		if params += ", short"; params == "void, short" {
			params = "short"
		}
		fmt.Fprintf(&b, "%s (*check_%s)(%s);\n", result, name, params)
	}
	b.WriteString("int main(void) {\n")
	for name := range prototypes {
		fmt.Fprintf(&b, "(void)sizeof(check_%s = %s);\n", name, name)
	}
	b.WriteString("}\n")
	out, _ := h.compile(b.String())
	for name := range prototypes {
		if !strings.Contains(string(out), "check_"+name+" =") {
			t.Errorf("a wrong prototype of %s compiles", name)
		}
	}
}

// TestPrototypes compares the symbol tables with the C prototypes.
func TestPrototypes(t *testing.T) {
	for _, table := range []reflect.Type{reflect.TypeFor[hip.API](), reflect.TypeFor[hip.RTC]()} {
		for field := range table.Fields() {
			if field.Name != "_" {
				comparePrototype(t, field)
			}
		}
	}
}

func comparePrototype(t *testing.T, field reflect.StructField) {
	t.Helper()
	name := hip.Symbol(field.Name)
	c, ok := prototypes[strings.TrimSuffix(name, "R0600")]
	if !ok {
		t.Errorf("%s: no prototype", name)
		return
	}
	var want, got []reflect.Type
	if c != "void" {
		for param := range strings.SplitSeq(c, ", ") {
			want = append(want, goTypes[param])
		}
	}
	for param := range field.Type.Ins() {
		got = append(got, param)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: got %v, want %v", name, got, want)
	}
	if _, result := resultOf(name); field.Type.NumOut() != 1 || field.Type.Out(0) != result {
		t.Errorf("%s: wrong result", name)
	}
}
