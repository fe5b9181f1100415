// What hipRTC has built in and the kernels use, for clang without any header.
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __launch_bounds__(n) __attribute__((launch_bounds(n)))
struct index_x { unsigned x; };
#define threadIdx (index_x{__builtin_amdgcn_workitem_id_x()})
#define blockIdx (index_x{__builtin_amdgcn_workgroup_id_x()})
#define __shared__ __attribute__((shared))
static __device__ inline void __syncthreads() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
