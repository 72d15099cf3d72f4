// Quick-gelu, x / (1 + exp(-factor x)), of numbers of 16 bits, computed in f32 and
// rounded once. The kernel reads and writes 16 bytes at a time, so it waits for memory
// only: for 64 images of imagegpt-small ONNX Runtime's own kernel takes 0.50 ms per
// layer, and a copy of as many bytes an eighth of a millisecond.
//
// `make kernels` compiles this file to quick_gelu.ptx, which the worker carries and the
// driver compiles for the GPU that there is (compute capability 8.0 or newer).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

__device__ float quick_gelu(float x, float factor) {
    return __fdividef(x, 1.0f + __expf(-factor * x));
}

__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }
__device__ void narrow(float x, __nv_bfloat16 &y) { y = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half &y) { y = __float2half_rn(x); }

// Numbers in 16 bytes.
constexpr unsigned long long PACK = 8;

template <typename T>
__device__ void apply(const T *x, T *y, unsigned long long n, float factor) {
    const unsigned long long thread = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
    const unsigned long long first = thread * PACK;
    if (first >= n) {
        return;
    }
    if (first + PACK <= n) {
        union Pack {
            uint4 bytes;
            T numbers[PACK];
            __device__ Pack() {}
        } pack;
        pack.bytes = reinterpret_cast<const uint4 *>(x)[thread];
        for (int idx = 0; idx < PACK; ++idx) {
            narrow(quick_gelu(widen(pack.numbers[idx]), factor), pack.numbers[idx]);
        }
        reinterpret_cast<uint4 *>(y)[thread] = pack.bytes;
        return;
    }
    for (unsigned long long idx = first; idx < n; ++idx) {
        narrow(quick_gelu(widen(x[idx]), factor), y[idx]);
    }
}

}  // namespace

extern "C" __global__ void quick_gelu_bf16(
    const __nv_bfloat16 *x, __nv_bfloat16 *y, unsigned long long n, float factor) {
    apply(x, y, n, factor);
}

extern "C" __global__ void quick_gelu_fp16(
    const __half *x, __half *y, unsigned long long n, float factor) {
    apply(x, y, n, factor);
}
