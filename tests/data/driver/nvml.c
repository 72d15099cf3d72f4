/* What src/gpu/nvml.rs calls of NVIDIA's libnvidia-ml.so.1, of the devices in
 * cuda.c and one more that CUDA does not show. tests/it/gpu.rs compiles it,
 * also as one that hangs or aborts, as cuda.c. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NOT_SUPPORTED = 3, NOT_FOUND = 6 };

struct device {
    const char *uuid;
    unsigned long long total, used;
    int is_part;
};

static const struct device DEVICES[] = {
    {"GPU-ffffffff-ffff-ffff-ffff-ffffffffffff", 1, 1, 0},
    {"MIG-10111213-1415-1617-1819-1a1b1c1d1e1f", 10ULL << 30, 1ULL << 30, 1},
    {"GPU-00010203-0405-0607-0809-0a0b0c0d0e0f", 80ULL << 30, 8ULL << 30, 0},
};

int nvmlInit_v2(void) {
#ifdef NVML_HANGS
    for (;;) pause();
#endif
#ifdef NVML_ABORTS
    abort();
#endif
    return 0;
}

int nvmlShutdown(void) { return 0; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    snprintf(version, length, "580.82.07");
    return 0;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, const struct device **device) {
    for (size_t i = 0; i < sizeof DEVICES / sizeof *DEVICES; i++)
        if (strcmp(DEVICES[i].uuid, uuid) == 0) {
            *device = &DEVICES[i];
            return 0;
        }
    return NOT_FOUND;
}

struct memory {
    unsigned version;
    unsigned long long total, reserved, available, used;
};

int nvmlDeviceGetMemoryInfo_v2(const struct device *device, struct memory *memory) {
    memory->total = device->total;
    memory->used = device->used;
    memory->available = device->total - device->used;
    memory->reserved = 0;
    return 0;
}

int nvmlDeviceGetUtilizationRates(const struct device *device, unsigned rates[2]) {
    if (device->is_part) return NOT_SUPPORTED;
    rates[0] = 75;
    rates[1] = 10;
    return 0;
}

int nvmlDeviceGetPowerUsage(const struct device *device, unsigned *milliwatts) {
    if (device->is_part) return NOT_SUPPORTED;
    *milliwatts = 350000;
    return 0;
}
