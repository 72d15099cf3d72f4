/* What src/gpu/driver.rs and kernels.rs call of NVIDIA's libcuda.so.1, of a machine with a
 * whole GPU and a part of one (MIG), in the order that CUDA counts in.
 * tests/it/gpu.rs compiles it, also as one that never answers (CUDA_HANGS) and
 * one that takes its process with it (CUDA_ABORTS). */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { N_DEVICES = 2, BAD_VALUE = 1, NOT_INITIALIZED = 3, BAD_DEVICE = 101 };

static int initialized;

int cuInit(unsigned flags) {
    if (flags != 0) return BAD_VALUE;
#ifdef CUDA_HANGS
    for (;;) pause();
#endif
#ifdef CUDA_ABORTS
    abort();
#endif
    initialized = 1;
    return 0;
}

int cuDriverGetVersion(int *version) {
    *version = 13020;
    return 0;
}

int cuDeviceGetCount(int *count) {
    if (!initialized) return NOT_INITIALIZED;
    *count = N_DEVICES;
    return 0;
}

/* A device is a handle, and not its number. */
int cuDeviceGet(int *device, int ordinal) {
    if (ordinal < 0 || ordinal >= N_DEVICES) return BAD_DEVICE;
    *device = 40 + ordinal;
    return 0;
}

int cuDeviceGetUuid_v2(unsigned char uuid[16], int device) {
    for (int i = 0; i < 16; i++) uuid[i] = (unsigned char)(16 * (device - 40) + i);
    return 0;
}

int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 40 ? "Fake GPU" : "Fake GPU MIG 1g.10gb", (size_t)length);
    return 0;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = (device == 40 ? (size_t)80 : (size_t)10) << 30;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (device < 40) return BAD_DEVICE;
    switch (attribute) {
    case 75: *value = 9; return 0;
    case 76: *value = 0; return 0;
    default: return BAD_VALUE;
    }
}

int cuGetErrorString(int error, const char **text) {
    *text = error == NOT_INITIALIZED ? "initialization error" : "invalid";
    return 0;
}

/* Kernels. There is one context, one module and, of its functions, the two that
 * the PTX declares; what is launched is computed at once, on the host's memory. */
static char context, module, fp16, bf16;

int cuCtxGetCurrent(void **current) {
    *current = &context;
    return 0;
}

int cuCtxGetDevice(int *device) {
    *device = 40;
    return 0;
}

static const char *ptx;

int cuModuleLoadData(void **loaded, const void *image) {
    ptx = image;
    if (!strstr(ptx, "\n.version ") || !strstr(ptx, "\n.target sm_80")) return BAD_VALUE;
    *loaded = &module;
    return 0;
}

int cuModuleGetFunction(void **function, void *of, const char *name) {
    char entry[64] = ".visible .entry ";
    if (of != &module || !strstr(ptx, strncat(strncat(entry, name, 32), "(", 2))) return BAD_VALUE;
    *function = strcmp(name, "quick_gelu_fp16") ? (void *)&bf16 : (void *)&fp16;
    return 0;
}

/* bfloat16 is the upper half of a float; of fp16 the test takes no others than
 * those whose bits it knows, so here their kernel copies. */
int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                   void *stream, void **parameters, void **extra) {
    const uint16_t *x = *(uint16_t **)parameters[0];
    uint16_t *y = *(uint16_t **)parameters[1];
    uint64_t n = *(uint64_t *)parameters[2];
    float factor = *(float *)parameters[3];
    if (grid_y * grid_z * block_y * block_z != 1 || shared_bytes != 0 || extra != NULL) {
        return BAD_VALUE;
    }
    if (stream != NULL || grid_x != (n + 8 * block_x - 1) / (8 * block_x)) return BAD_VALUE;
    for (uint64_t i = 0; i < n; i++) {
        union { uint32_t bits; float number; } wide = {(uint32_t)x[i] << 16};
        if (function == &fp16) { y[i] = x[i]; continue; }
        wide.number = wide.number / (1 + expf(-factor * wide.number));
        y[i] = (uint16_t)(wide.bits >> 16);
    }
    return 0;
}
