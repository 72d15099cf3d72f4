/* What src/gpu/driver.rs calls of NVIDIA's libcuda.so.1, of a machine with a
 * whole GPU and a part of one (MIG), in the order that CUDA counts in.
 * tests/it/gpu.rs compiles it, also as one that never answers (CUDA_HANGS) and
 * one that takes its process with it (CUDA_ABORTS). */
#include <stddef.h>
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
