/* Peaks of this CPU: bare loops of the instructions that do the work of a matrix
 * product, on registers alone, on as many threads as the first argument says.
 * Prints operations per second as JSON, by instruction; one multiplication and
 * addition are two operations. Instructions that the CPU does not have are left
 * out. */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SECONDS 0.2
#define STEPS 200000
/* Sums that are added to independently, so that no sum is waited for. */
#define SUMS 12
#define THREADS_MAX 256

/* A loop of one instruction. The empty asm keeps a compiler from doing a step
 * once for all sums, or not at all. */
#define LOOP(name, features, vector, zero, factor, step)                          \
    __attribute__((target(features))) static void name(void) {                    \
        vector sums[SUMS], x = factor, y = factor;                                \
        _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++) sums[i] = zero;   \
        for (long n = 0; n < STEPS; n++) {                                        \
            _Pragma("GCC unroll 12") for (int i = 0; i < SUMS; i++) {             \
                __asm__ volatile("" : "+v"(x), "+v"(y));                          \
                vector sum = sums[i];                                             \
                sums[i] = step;                                                   \
                __asm__ volatile("" : "+v"(sums[i]));                             \
            }                                                                     \
        }                                                                         \
    }

LOOP(fma_avx2, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_set1_ps(0.5f),
     _mm256_fmadd_ps(x, y, sum))
LOOP(fma_avx512, "avx512f", __m512, _mm512_setzero_ps(), _mm512_set1_ps(0.5f),
     _mm512_fmadd_ps(x, y, sum))
LOOP(words_avx2, "avx2", __m256i, _mm256_setzero_si256(), _mm256_set1_epi16(3),
     _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)))
LOOP(words_avx512, "avx512f,avx512bw", __m512i, _mm512_setzero_si512(), _mm512_set1_epi16(3),
     _mm512_add_epi32(sum, _mm512_madd_epi16(x, y)))
LOOP(bytes_avx_vnni, "avx2,avxvnni", __m256i, _mm256_setzero_si256(), _mm256_set1_epi8(3),
     _mm256_dpbusd_avx_epi32(sum, x, y))
LOOP(bytes_avx512_vnni, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), _mm512_set1_epi8(3),
     _mm512_dpbusd_epi32(sum, x, y))
LOOP(bf16_avx512, "avx512f,avx512bw,avx512bf16", __m512, _mm512_setzero_ps(), _mm512_set1_ps(0.5f),
     _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y))

/* Eight tiles of 16 rows of 64 bytes: four of sums, two of each factor. Constant,
 * because GCC thinks that the instruction reads only the first 8 bytes. */
#define EIGHT(value) value, value, value, value, value, value, value, value
static const struct {
    unsigned char palette, start_row, reserved[14];
    unsigned short row_bytes[16];
    unsigned char rows[16];
} TILES = {.palette = 1, .row_bytes = {EIGHT(64)}, .rows = {EIGHT(16)}};

#define TILE_LOOP(name, features, step)                                           \
    __attribute__((target("amx-tile," features))) static void name(void) {        \
        _tile_loadconfig(&TILES);                                                 \
        for (long n = 0; n < STEPS; n++) {                                        \
            step(0, 4, 6);                                                        \
            step(1, 4, 7);                                                        \
            step(2, 5, 6);                                                        \
            step(3, 5, 7);                                                        \
        }                                                                         \
        _tile_release();                                                          \
    }

TILE_LOOP(bytes_amx, "amx-int8", _tile_dpbssd)
TILE_LOOP(bf16_amx, "amx-bf16", _tile_dpbf16ps)

/* Linux gives the memory of tiles only to a process that asks for it. */
static int has_tiles(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return __builtin_cpu_supports("amx-tile") && !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}

struct loop {
    const char *name;
    void (*run)(void);
    double operations; /* of one run */
    int is_there;
};

/* Seconds that this thread had a core, so that other work takes nothing away. */
static double on_core(void) {
    struct timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static const struct loop *current;

static void *work(void *rate) {
    double start = on_core(), elapsed;
    long runs = 0;
    do {
        current->run();
        runs++;
        elapsed = on_core() - start;
    } while (elapsed < SECONDS);
    *(double *)rate = runs * current->operations / elapsed;
    return NULL;
}

int main(int argc, char **argv) {
    int n_threads = argc > 1 ? atoi(argv[1]) : 2;
    if (n_threads < 1 || n_threads > THREADS_MAX) return 2;
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = __builtin_cpu_supports("avx512bw"), tiles = has_tiles();
    int vnni = __builtin_cpu_supports("avx512vnni");
    double one = (double)STEPS * SUMS, tile = 4.0 * STEPS;
    const struct loop loops[] = {
        {"fp32_fma", fma_avx512, 32 * one, avx512},
        {"fp32_fma", fma_avx2, 16 * one, avx2 && !avx512},
        {"int8_vpmaddwd", words_avx512, 64 * one, avx512},
        {"int8_vpmaddwd", words_avx2, 32 * one, avx2 && !avx512},
        {"int8_vnni", bytes_avx512_vnni, 128 * one, vnni},
        {"int8_vnni", bytes_avx_vnni, 64 * one, !vnni && __builtin_cpu_supports("avxvnni")},
        {"bf16_dot", bf16_avx512, 64 * one, __builtin_cpu_supports("avx512bf16")},
        {"int8_amx", bytes_amx, 32768 * tile, tiles && __builtin_cpu_supports("amx-int8")},
        {"bf16_amx", bf16_amx, 16384 * tile, tiles && __builtin_cpu_supports("amx-bf16")},
    };
    const char *separator = "{";
    for (size_t i = 0; i < sizeof loops / sizeof *loops; i++) {
        if (!loops[i].is_there) continue;
        current = &loops[i];
        pthread_t threads[THREADS_MAX];
        double rates[THREADS_MAX], sum = 0;
        for (int t = 0; t < n_threads; t++)
            if (pthread_create(&threads[t], NULL, work, &rates[t])) return 1;
        for (int t = 0; t < n_threads; t++) {
            pthread_join(threads[t], NULL);
            sum += rates[t];
        }
        printf("%s\"%s\": %.4g", separator, loops[i].name, sum);
        separator = ", ";
    }
    puts(*separator == '{' ? "{}" : "}");
    return 0;
}
