/* Fake driver of one device, whose memory is the host's. A stream does its copies when it is
 * waited for and not before, so that a missing wait is seen. While somebody captures, calls that
 * would spoil the capture are refused and counted. After an illegal address every call fails. */
#include <stdlib.h>
#include <string.h>

#define COPIES_MAX 64
#define OUT_OF_MEMORY 2
#define INVALID_VALUE 1
#define INVALID_CONTEXT 201
#define ILLEGAL_ADDRESS 700
#define CAPTURE_UNSUPPORTED 900

struct copy { void *to; const void *from; size_t bytes; };
struct stream { struct copy copies[COPIES_MAX]; int n; };

static int context, held, streams, buffers, uploads, downloads, waits, spoiled, after_loss;
static size_t pinned, most_pinned;
static int is_capturing, is_lost, fails_with;
static char failing[64];
static __thread int mode, pushed;

long fake_count(const char *what) {
    struct { const char *what; long n; } all[] = {
        {"held", held}, {"streams", streams}, {"buffers", buffers}, {"uploads", uploads},
        {"downloads", downloads}, {"waits", waits}, {"spoiled", spoiled}, {"mode", mode},
        {"pushed", pushed}, {"pinned", (long)pinned}, {"most pinned", (long)most_pinned},
        {"after loss", after_loss},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(all[i].what, what)) return all[i].n;
    abort();
}

void fake_capture(int on) { is_capturing = on; }

/* From now on this call fails; with no name, none does. */
void fake_fail(const char *call, int status) {
    strncpy(failing, call, sizeof failing - 1);
    fails_with = status;
}

static int enter(const char *call) {
    if (is_lost) {
        after_loss += 1;
        return ILLEGAL_ADDRESS;
    }
    if (strcmp(failing, call)) return 0;
    is_lost = fails_with == ILLEGAL_ADDRESS;
    return fails_with;
}

/* A call that may spoil a capture: an unsafe one does in every mode, others unless the thread
 * ignores the captures of others. */
static int enter_beside(const char *call, int is_unsafe) {
    int status = enter(call);
    if (status) return status;
    if (!pushed) return INVALID_CONTEXT;
    if (!is_capturing || (!is_unsafe && mode == 1)) return 0;
    spoiled += 1;
    return CAPTURE_UNSUPPORTED;
}

int cuGetErrorString(int status, const char **text) {
    *text = status == ILLEGAL_ADDRESS ? "an illegal memory access was encountered"
        : status == OUT_OF_MEMORY ? "out of memory"
        : status == CAPTURE_UNSUPPORTED ? "operation not permitted when stream is capturing"
        : "some error";
    return 0;
}

int cuInit(unsigned flags) { return enter("cuInit") ? fails_with : (int)flags; }

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal + 10;
    return ordinal == 0 ? enter("cuDeviceGet") : 101;
}

int cuDevicePrimaryCtxRetain(void **made, int device) {
    int status = enter("cuDevicePrimaryCtxRetain");
    if (status) return status;
    *made = &context;
    held += 1;
    return device == 10 ? 0 : INVALID_VALUE;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    int status = enter("cuDevicePrimaryCtxRelease");
    if (status) return status;
    held -= 1;
    return device == 10 && held >= 0 ? 0 : INVALID_VALUE;
}

int cuCtxPushCurrent_v2(void *current) {
    int status = enter("cuCtxPushCurrent");
    if (status) return status;
    pushed += 1;
    return current == &context && held > 0 ? 0 : INVALID_VALUE;
}

int cuCtxPopCurrent_v2(void **current) {
    /* A lost context can still be popped. */
    pushed -= 1;
    *current = &context;
    return pushed < 0 ? INVALID_CONTEXT : enter("cuCtxPopCurrent");
}

#ifndef WITHOUT_MODES
int cuThreadExchangeStreamCaptureMode(int *exchanged) {
    int status = enter("cuThreadExchangeStreamCaptureMode");
    if (status) return status;
    int before = mode;
    mode = *exchanged;
    *exchanged = before;
    return 0;
}
#endif

int cuStreamCreate(struct stream **made, unsigned flags) {
    int status = enter_beside("cuStreamCreate", 1);
    if (status) return status;
    *made = calloc(1, sizeof **made);
    streams += 1;
    return flags == 1 ? 0 : INVALID_VALUE;
}

int cuStreamDestroy_v2(struct stream *stream) {
    int status = enter_beside("cuStreamDestroy", 1);
    if (status) return status;
    status = stream->n ? INVALID_VALUE : 0;
    free(stream);
    streams -= 1;
    return status;
}

int cuStreamSynchronize(struct stream *stream) {
    int status = enter_beside("cuStreamSynchronize", 0);
    if (status) return status;
    for (int i = 0; i < stream->n; i++)
        memcpy(stream->copies[i].to, stream->copies[i].from, stream->copies[i].bytes);
    stream->n = 0;
    waits += 1;
    return 0;
}

int cuMemHostAlloc(void **data, size_t bytes, unsigned flags) {
    int status = enter_beside("cuMemHostAlloc", 1);
    if (status) return status;
    size_t *made = malloc(sizeof *made + bytes);
    *made = bytes;
    *data = made + 1;
    buffers += 1;
    pinned += bytes;
    if (pinned > most_pinned) most_pinned = pinned;
    return flags ? INVALID_VALUE : 0;
}

int cuMemFreeHost(void *data) {
    int status = enter_beside("cuMemFreeHost", 1);
    if (status) return status;
    size_t *made = (size_t *)data - 1;
    buffers -= 1;
    pinned -= *made;
    free(made);
    return 0;
}

static int begin(struct stream *stream, void *to, const void *from, size_t bytes) {
    if (stream->n == COPIES_MAX) return OUT_OF_MEMORY;
    stream->copies[stream->n++] = (struct copy){to, from, bytes};
    return 0;
}

int cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, struct stream *stream) {
    int status = enter_beside("cuMemcpyHtoDAsync", 0);
    if (status) return status;
    uploads += 1;
    return begin(stream, (void *)to, from, bytes);
}

int cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t bytes, struct stream *stream) {
    int status = enter_beside("cuMemcpyDtoHAsync", 0);
    if (status) return status;
    downloads += 1;
    return begin(stream, to, (const void *)from, bytes);
}
