// The inference engine's inner loops on a CPU: linear maps, norms, gated units and attention over a paged cache.
//
// Each output element is computed by one fixed sequence of operations that depends on nothing but its own row: a dot
// product is one vector accumulator over k, summed across lanes in one order; attention walks the keys 32 at a time
// from the first. So a row gives the same bits whatever it is computed together with, and tiles are free to be chosen
// for speed. bf16 is widened exactly when it is read and rounded once (to nearest even) when it is written.
//
// Compiled at first use for the machine it runs on (see __init__.py). Strides and sizes are in elements.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define L 16
#else
#define L 8
#endif

typedef float vf __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * L), aligned(2), may_alias));

enum { FP32 = 0, BF16 = 1 };

static inline vf splat(float x) { return x - (vf){0}; }
static inline vf load32(const float *p) { return *(const vf *)p; }
static inline vf load16(const uint16_t *p) { return (vf)(__builtin_convertvector(*(const vh *)p, vu) << 16); }

// a * b + c, rounded once. Spelt out: left to itself the compiler contracts in some loops and not in others.
static inline vf fma_(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Keeps a loaded vector in a register: compilers would rather load it again for every use, and loads are what a tile has
// least of.
#if defined(__AVX512F__)
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined(__AVX__)
#define KEEP(v) __asm__("" : "+x"(v))
#else
#define KEEP(v)
#endif

static inline vh narrow(vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(x != x);
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vh);
}

static inline float widen1(uint16_t h) {
    union { uint32_t u; float f; } x = {(uint32_t)h << 16};
    return x.f;
}

static inline uint16_t narrow1(float f) {
    union { float f; uint32_t u; } x = {f};
    if (f != f) return 0x7fc0;
    return (x.u + 0x7fff + ((x.u >> 16) & 1)) >> 16;
}

// Lane i + half is added to lane i for half = L / 2 .. 1.
static inline float sum(vf v) {
#if defined(__AVX512F__)
    __m256 o = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                             _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
#elif defined(__AVX__)
    __m256 o = (__m256)v;
#endif
#if defined(__AVX__)
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(o), _mm256_extractf128_ps(o, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
#else
    float s[L];
    memcpy(s, &v, sizeof s);
    for (int half = L / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
#endif
}

static inline vf max_of(vf a, vf b) {
    vi greater = a > b;
    return (vf)((greater & (vi)a) | (~greater & (vi)b));
}

// e^x to about 2 ulp (Cephes' expf: 2^n times a polynomial of the remainder); below -87.3 it is 0, above 88 e^88. NaN
// stays NaN.
static inline vf exp_of(vf x) {
    vi tiny = x < -87.3f, huge = x > 88.0f;
    x = (vf)((huge & (vi)splat(88.0f)) | (~huge & (vi)x));
    vf t = x * 1.44269504088896341f;
    vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    vf shifted = t + magic;
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi scale = ((vi)shifted << 23) + (127 << 23);
    return (vf)(~tiny & (vi)(p * (vf)scale));
}

static void widen_row(float *to, const void *from, int64_t at, int64_t n, int dtype) {
    if (dtype == FP32) {
        memcpy(to, (const float *)from + at, n * sizeof(float));
        return;
    }
    const uint16_t *h = (const uint16_t *)from + at;
    int64_t i = 0;
    for (; i + L <= n; i += L) *(vf *)(to + i) = load16(h + i);
    for (; i < n; i++) to[i] = widen1(h[i]);
}

static void narrow_row(void *to, const float *from, int64_t at, int64_t n, int dtype) {
    if (dtype == FP32) {
        memcpy((float *)to + at, from, n * sizeof(float));
        return;
    }
    uint16_t *h = (uint16_t *)to + at;
    int64_t i = 0;
    for (; i + L <= n; i += L) *(vh *)(h + i) = narrow(load32(from + i));
    for (; i < n; i++) h[i] = narrow1(from[i]);
}

// ------------------------------------------------------------------------------------------------------------- linear

// Rows are padded with zeros to a multiple of G, so every dot product is whole vectors. The two vectors of a bf16 group
// are its even and its odd elements: halves of 32-bit words, which take one operation each to widen. x and w are both
// held that way.
#define G (2 * L)
// Rows of x that stay in the first-level cache while rows of w pass by, and rows of w that stay in the second-level cache
// until all rows of x have met them; in floats. So w is read from memory once.
#define X_CACHE 6144
#define W_CACHE 49152

// Ask for `bytes` from p on, before they are needed: the processor by itself looks no further than a page.
static inline void prefetch(const char *p, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 0, 2);
}

static inline int64_t within(int64_t cache, int64_t kp, int64_t step, int64_t most) {
    int64_t rows = cache / kp / step * step;
    return rows < step ? step : rows > most ? most : rows;
}

static inline vf low32(const float *p) { return load32(p); }
static inline vf high32(const float *p) { return load32(p + L); }
static inline vf low16(const uint16_t *p) { return (vf)(*(const vu *)p << 16); }
static inline vf high16(const uint16_t *p) { return (vf)(*(const vu *)p & 0xffff0000); }

// k elements, as fp32 groups, zeros behind them up to kp.
static void widen_groups(float *to, const void *from, int64_t at, int64_t k, int64_t kp, int dtype) {
    if (dtype == FP32) {
        memcpy(to, (const float *)from + at, k * sizeof(float));
        memset(to + k, 0, (kp - k) * sizeof(float));
        return;
    }
    const uint16_t *h = (const uint16_t *)from + at;
    int64_t i = 0;
    for (; i + G <= k; i += G) {
        *(vf *)(to + i) = low16(h + i);
        *(vf *)(to + i + L) = high16(h + i);
    }
    if (i < kp) {
        memset(to + i, 0, G * sizeof(float));
        for (int64_t j = 0; i + j < k; j++) to[i + j / 2 + j % 2 * L] = widen1(h[i + j]);
    }
}

#if defined(__AVX512F__)
// sum() of four vectors.
static inline __m128 sums(const __m512 v[4]) {
    __m512 ab = _mm512_shuffle_f32x4(v[0], v[1], 0x44) + _mm512_shuffle_f32x4(v[0], v[1], 0xee);
    __m512 cd = _mm512_shuffle_f32x4(v[2], v[3], 0x44) + _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    __m512 q = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
    q += _mm512_permute_ps(q, 0xee);
    q += _mm512_permute_ps(q, 0x55);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0), q));
}

#define SUMS(MR, NR)                                                                                                   \
    for (int i = 0; i < MR; i++)                                                                                       \
        if (NR == 4) _mm_storeu_ps(y + i * ys, sums((const __m512 *)acc[i]));                                          \
        else                                                                                                           \
            for (int j = 0; j < NR; j++) y[i * ys + j] = sum(acc[i][j]);
#define MOST_ROWS 6  // of a tile, and its columns: as many sums as there are registers for
#define COLUMNS 4
#else
#define SUMS(MR, NR)                                                                                                   \
    for (int i = 0; i < MR; i++)                                                                                       \
        for (int j = 0; j < NR; j++) y[i * ys + j] = sum(acc[i][j]);
#define MOST_ROWS 4
#define COLUMNS 3
#endif

#define TILE(MR, NR, BITS, WTYPE)                                                                                      \
    static inline __attribute__((always_inline)) void tile_##MR##x##NR##group##BITS(                                   \
        const float *x, int64_t xs, const WTYPE *w, int64_t ws, int64_t k, float *y, int64_t ys) {                     \
        vf acc[MR][NR], b[NR];                                                                                         \
        for (int i = 0; i < MR; i++)                                                                                   \
            for (int j = 0; j < NR; j++) acc[i][j] = (vf){0};                                                          \
        for (int64_t at = 0; at < k; at += G) {                                                                        \
            for (int j = 0; j < NR; j++) b[j] = low##BITS(w + j * ws + at);                                            \
            for (int j = 0; j < NR && MR > 1; j++) KEEP(b[j]);                                                         \
            for (int i = 0; i < MR; i++) {                                                                             \
                vf a = load32(x + i * xs + at);                                                                        \
                KEEP(a);                                                                                               \
                for (int j = 0; j < NR; j++) acc[i][j] = fma_(a, b[j], acc[i][j]);                                     \
            }                                                                                                          \
            for (int j = 0; j < NR; j++) b[j] = high##BITS(w + j * ws + at);                                           \
            for (int j = 0; j < NR && MR > 1; j++) KEEP(b[j]);                                                         \
            for (int i = 0; i < MR; i++) {                                                                             \
                vf a = load32(x + i * xs + at + L);                                                                    \
                KEEP(a);                                                                                               \
                for (int j = 0; j < NR; j++) acc[i][j] = fma_(a, b[j], acc[i][j]);                                     \
            }                                                                                                          \
        }                                                                                                              \
        SUMS(MR, NR)                                                                                                   \
    }

#if defined(__AVX512F__)
TILE(6, 4, 32, float)
TILE(5, 4, 32, float)
TILE(4, 4, 32, float)
TILE(3, 4, 32, float)
TILE(2, 4, 32, float)
TILE(1, 4, 32, float)
TILE(6, 1, 32, float)
TILE(5, 1, 32, float)
#else
TILE(4, 3, 32, float)
TILE(3, 3, 32, float)
TILE(2, 3, 32, float)
TILE(1, 3, 32, float)
#endif
TILE(4, 1, 32, float)
TILE(3, 1, 32, float)
TILE(2, 1, 32, float)
TILE(1, 1, 32, float)
TILE(1, 8, 32, float)
TILE(1, 8, 16, uint16_t)
TILE(1, 1, 16, uint16_t)

// y[m, n] of rows [0, m) and n <= COLUMNS columns, all operands fp32 groups.
#define ROWS_OF(MR, NR, W, Y) tile_##MR##x##NR##group32(x + i * k, k, W, k, k, Y + i * ys, ys)
#if defined(__AVX512F__)
#define ROWS(NR, W, Y)                                                                                                 \
    do {                                                                                                               \
        int64_t i = 0;                                                                                                 \
        for (; i + 6 <= m; i += 6) ROWS_OF(6, NR, W, Y);                                                               \
        if (m - i == 5) ROWS_OF(5, NR, W, Y);                                                                          \
        if (m - i == 4) ROWS_OF(4, NR, W, Y);                                                                          \
        if (m - i == 3) ROWS_OF(3, NR, W, Y);                                                                          \
        if (m - i == 2) ROWS_OF(2, NR, W, Y);                                                                          \
        if (m - i == 1) ROWS_OF(1, NR, W, Y);                                                                          \
    } while (0)
#define ALL_COLUMNS(W, Y) ROWS(4, W, Y)
#else
#define ROWS(NR, W, Y)                                                                                                 \
    do {                                                                                                               \
        int64_t i = 0;                                                                                                 \
        for (; i + 4 <= m; i += 4) ROWS_OF(4, NR, W, Y);                                                               \
        if (m - i == 3) ROWS_OF(3, NR, W, Y);                                                                          \
        if (m - i == 2) ROWS_OF(2, NR, W, Y);                                                                          \
        if (m - i == 1) ROWS_OF(1, NR, W, Y);                                                                          \
    } while (0)
#define ALL_COLUMNS(W, Y) ROWS(3, W, Y)
#endif

static void block(const float *x, int64_t m, const float *w, int n, int64_t k, float *y, int64_t ys) {
    if (n == COLUMNS) ALL_COLUMNS(w, y);
    else for (int j = 0; j < n; j++) ROWS(1, w + j * k, y + j);
}

// One row of x times n rows of w, straight from memory: as fast as w can be read.
static void row_times(const float *x, const void *w, int64_t n, int64_t k, int64_t kp, int dtype, float *y) {
    int64_t j = 0;
    if (kp != k) {  // rows of w are not whole groups: through a padded copy
        float copy[kp];
        for (; j < n; j++) {
            widen_groups(copy, w, j * k, k, kp, dtype);
            tile_1x1group32(x, kp, copy, kp, kp, y + j, 1);
        }
    } else if (dtype == FP32) {
        const float *p = w;
        for (; j + 8 <= n; j += 8) {
            prefetch((const char *)(p + (j + 8) * k), 8 * k * sizeof *p);
            tile_1x8group32(x, k, p + j * k, k, k, y + j, n);
        }
        for (; j < n; j++) tile_1x1group32(x, k, p + j * k, k, k, y + j, n);
    } else {
        const uint16_t *p = w;
        for (; j + 8 <= n; j += 8) {
            prefetch((const char *)(p + (j + 8) * k), 8 * k * sizeof *p);
            tile_1x8group16(x, k, p + j * k, k, k, y + j, n);
        }
        for (; j < n; j++) tile_1x1group16(x, k, p + j * k, k, k, y + j, n);
    }
}

#if defined(__AVX512BF16__)
// With bf16 products in hardware nothing is widened: an instruction adds 32 of them to 16 sums, in one order for all.

// n <= 4 of a row's outputs: bias and rounding.
static inline __attribute__((always_inline)) void finish(__m128 out, int64_t n, const uint16_t *bias, uint16_t *y) {
    uint16_t made[4], added[4] = {0};
    if (bias) {
        memcpy(added, bias, n == 4 ? 8 : n * sizeof(uint16_t));
        out += _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)added)), 16));
    }
    _mm_storel_epi64((__m128i *)made, (__m128i)_mm_cvtneps_pbh(out));
    memcpy(y, made, n == 4 ? 8 : n * sizeof(uint16_t));
}

// MR rows of x times n <= 4 rows of w; fewer than four are the last one again, and not written.
#define TILE_BF16(MR)                                                                                                  \
    static inline __attribute__((always_inline)) void bf16_tile_##MR(                                                  \
        const uint16_t *x, int64_t xs, const uint16_t *w, int64_t n, int64_t k, const uint16_t *bias, uint16_t *y,     \
        int64_t ys) {                                                                                                  \
        const uint16_t *row[4];                                                                                        \
        __m512 acc[MR][4];                                                                                             \
        for (int j = 0; j < 4; j++) row[j] = w + (j < n ? j : n - 1) * k;                                              \
        for (int i = 0; i < MR; i++)                                                                                   \
            for (int j = 0; j < 4; j++) acc[i][j] = _mm512_setzero_ps();                                               \
        for (int64_t at = 0; at < k; at += G) {                                                                        \
            __m512i b[4];                                                                                              \
            for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_si512(row[j] + at);                                        \
            for (int j = 0; j < 4 && MR > 1; j++) KEEP(b[j]);                                                          \
            for (int i = 0; i < MR; i++) {                                                                             \
                __m512i a = _mm512_loadu_si512(x + i * xs + at);                                                       \
                KEEP(a);                                                                                               \
                for (int j = 0; j < 4; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)a, (__m512bh)b[j]);      \
            }                                                                                                          \
        }                                                                                                              \
        for (int i = 0; i < MR; i++) finish(sums(acc[i]), n, bias, y + i * ys);                                        \
    }

TILE_BF16(6)
TILE_BF16(5)
TILE_BF16(4)
TILE_BF16(3)
TILE_BF16(2)
TILE_BF16(1)

// y [m, n] of whole groups of k, w straight from memory: a block of its rows stays in the second-level cache while the
// rows of x pass by, as many of those at a time as the first-level cache holds, and the next block is fetched.
static void bf16_linear(uint16_t *y, const uint16_t *x, int64_t xs, const uint16_t *w, const uint16_t *bias, int64_t m,
                        int64_t n, int64_t k, int threads) {
    int64_t x_rows = within(2 * X_CACHE, k, 6, 96), w_rows = within(2 * W_CACHE, k, 4, 96);
    int64_t blocks = (n + w_rows - 1) / w_rows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < blocks; t++) {
        int64_t end = (t + 1) * w_rows < n ? (t + 1) * w_rows : n, left = n - end < w_rows ? n - end : w_rows;
        int64_t calls = (m + x_rows - 1) / x_rows * ((end - t * w_rows + 3) / 4);
        int64_t slice = (left * k * sizeof(uint16_t) / calls + 63) / 64 * 64;
        const char *next = (const char *)(w + end * k);
        for (int64_t from = 0; from < m; from += x_rows) {
            int64_t to = from + x_rows < m ? from + x_rows : m;
            for (int64_t j = t * w_rows; j < end; j += 4, next += slice) {
                prefetch(next, slice);
#define CALL(MR, N) bf16_tile_##MR(x + i * xs, xs, w + j * k, N, k, bias ? bias + j : NULL, y + i * n + j, n)
#define CALLS(N)                                                                                                       \
    do {                                                                                                               \
        int64_t i = from;                                                                                              \
        for (; i + 6 <= to; i += 6) CALL(6, N);                                                                        \
        if (to - i == 5) CALL(5, N);                                                                                   \
        if (to - i == 4) CALL(4, N);                                                                                   \
        if (to - i == 3) CALL(3, N);                                                                                   \
        if (to - i == 2) CALL(2, N);                                                                                   \
        if (to - i == 1) CALL(1, N);                                                                                   \
    } while (0)
                if (end - j >= 4) CALLS(4);
                else CALLS(end - j);
#undef CALLS
#undef CALL
            }
        }
    }
}
#endif

// The same of any operands, through fp32: x is widened whole, w a block at a time. Returns 0, or 1 without memory.
static int wide_linear(float *out, const void *x, int64_t xs, const void *w, int64_t m, int64_t n, int64_t k, int dtype,
                       int threads) {
    int64_t kp = (k + G - 1) / G * G;
    float *wide = malloc(m * kp * sizeof(float));
    if (!wide) return 1;
    for (int64_t i = 0; i < m; i++) widen_groups(wide + i * kp, x, i * xs, k, kp, dtype);
    int64_t x_rows = within(X_CACHE, kp, MOST_ROWS, 48), w_rows = m == 1 ? 64 : within(W_CACHE, kp, COLUMNS, 48);
    int64_t blocks = (n + w_rows - 1) / w_rows;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < blocks; t++) {
        int64_t at = t * w_rows, here = n - at < w_rows ? n - at : w_rows;
        const void *p = dtype == FP32 ? (const void *)((const float *)w + at * k) : (const uint16_t *)w + at * k;
        if (m == 1) {
            row_times(wide, p, here, k, kp, dtype, out + at);
            continue;
        }
        int direct = dtype == FP32 && kp == k;
        float copy[direct ? 1 : here * kp];
        for (int64_t j = 0; j < here && !direct; j++) widen_groups(copy + j * kp, p, j * k, k, kp, dtype);
        const float *rows = direct ? p : copy;
        int64_t width = dtype == FP32 ? sizeof(float) : sizeof(uint16_t);
        const char *next = (const char *)p + here * k * width;
        int64_t left = n - at - here < w_rows ? n - at - here : w_rows, calls = (m + x_rows - 1) / x_rows * ((here + COLUMNS - 1) / COLUMNS);
        int64_t slice = (left * k * width / calls + 63) / 64 * 64;
        for (int64_t i = 0; i < m; i += x_rows)
            for (int64_t j = 0; j < here; j += COLUMNS, next += slice) {
                prefetch(next, slice);
                block(wide + i * kp, m - i < x_rows ? m - i : x_rows, rows + j * kp,
                      here - j < COLUMNS ? here - j : COLUMNS, kp, out + i * n + at + j, n);
            }
    }
    free(wide);
    return 0;
}

// y [m, n] = x [m, k] w [n, k]^T + bias [n] (or NULL). x rows are xs apart; w and y are contiguous; one dtype for all.
// Returns 0, or 1 if there was no memory.
int rt_linear(void *y, const void *x, int64_t xs, const void *w, const void *bias, int64_t m, int64_t n, int64_t k,
              int dtype, int threads) {
#if defined(__AVX512BF16__)
    if (dtype == BF16 && k % G == 0) {
        bf16_linear(y, x, xs, w, bias, m, n, k, threads);
        return 0;
    }
#endif
    float *out = dtype == FP32 ? y : malloc(m * n * sizeof(float));
    int failed = !out || wide_linear(out, x, xs, w, m, n, k, dtype, threads);
    if (bias && !failed) {
        float wide_bias[n];
        widen_row(wide_bias, bias, 0, n, dtype);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) out[i * n + j] += wide_bias[j];
    }
    if (dtype == FP32) return failed;
    if (!failed) narrow_row(y, out, 0, m * n, dtype);
    free(out);
    return failed;
}

// ------------------------------------------------------------------------------------------------------ norm and gate

// y = x / sqrt(mean(x^2) + eps) * weight over rows of d; rows of x are xs apart, y is contiguous.
void rt_rms_norm(void *y, const void *x, int64_t xs, const void *weight, int64_t rows, int64_t d, float eps, int dtype) {
    int64_t dp = (d + L - 1) / L * L;
    float wide[dp], scale[d];
    widen_row(scale, weight, 0, d, dtype);
    memset(wide, 0, sizeof wide);
    for (int64_t i = 0; i < rows; i++) {
        widen_row(wide, x, i * xs, d, dtype);
        vf squares[4] = {{0}};
        int64_t at = 0;
        for (; at + 4 * L <= dp; at += 4 * L)
            for (int j = 0; j < 4; j++) squares[j] += load32(wide + at + j * L) * load32(wide + at + j * L);
        for (; at < dp; at += L) squares[0] += load32(wide + at) * load32(wide + at);
        float r = 1.0f / sqrtf(sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / d + eps);
        for (at = 0; at < d; at++) wide[at] = wide[at] * r * scale[at];
        narrow_row(y, wide, i * d, d, dtype);
    }
}

// y [rows, f] = silu(gate) * up of x [rows, gate f | up f].
void rt_swiglu(void *y, const void *x, int64_t rows, int64_t f, int dtype) {
    int64_t fp = (f + L - 1) / L * L;
    float *gate = malloc(2 * fp * sizeof(float)), *up = gate + fp;
    memset(gate, 0, 2 * fp * sizeof(float));
    for (int64_t i = 0; i < rows; i++) {
        widen_row(gate, x, i * 2 * f, f, dtype);
        widen_row(up, x, i * 2 * f + f, f, dtype);
        for (int64_t at = 0; at < fp; at += L) {
            vf g = load32(gate + at);
            *(vf *)(gate + at) = g / (1.0f + exp_of(-g)) * load32(up + at);
        }
        narrow_row(y, gate, i * f, f, dtype);
    }
    free(gate);
}

// ----------------------------------------------------------------------------------------------------------- attention

#define KEYS 32  // keys to a chunk: cache blocks are a multiple of it
#define QUERIES 8  // consecutive tokens of a sequence that share the reading of keys
#define VK (KEYS / L)

typedef struct {
    void *out;
    const void *q, *k, *v;
    int64_t qs, ks, vs;              // elements between rows of q, k, v
    void *kc, *vc;                   // [blocks, K, d, block] and [blocks, K, block, dp]
    const float *cosine, *sine;      // [positions, d / 2]
    const int32_t *sequence, *position;  // of each token
    const int32_t *tables;           // [sequences, width]: blocks of each sequence
    int64_t width, tokens, heads, groups, d, dp, block;
    float scale;
    int dtype, threads;
} Attend;

static void rotated(float *to, const void *from, int64_t at, const Attend *a, int64_t token) {
    int64_t half = a->d / 2;
    const float *c = a->cosine + a->position[token] * half, *s = a->sine + a->position[token] * half;
    float x[a->d];
    widen_row(x, from, at, a->d, a->dtype);
    for (int64_t i = 0; i < half; i++) {
        to[i] = x[i] * c[i] - x[i + half] * s[i];
        to[i + half] = x[i + half] * c[i] + x[i] * s[i];
    }
}

// Keys (turned) and values of a token go to their place in the cache.
static void store(const Attend *a, int64_t token) {
    int64_t at = a->position[token], slot = at % a->block;
    int64_t block = a->tables[a->sequence[token] * a->width + at / a->block];
    float key[a->d];
    for (int64_t g = 0; g < a->groups; g++) {
        rotated(key, a->k, token * a->ks + g * a->d, a, token);
        int64_t base = (block * a->groups + g) * a->d * a->block + slot;
        int64_t to = ((block * a->groups + g) * a->block + slot) * a->dp, from = token * a->vs + g * a->d;
        if (a->dtype == FP32) {
            float *kc = (float *)a->kc + base;
            for (int64_t i = 0; i < a->d; i++) kc[i * a->block] = key[i];
            memcpy((float *)a->vc + to, (const float *)a->v + from, a->d * sizeof(float));
        } else {
            uint16_t *kc = (uint16_t *)a->kc + base;
            for (int64_t i = 0; i < a->d; i++) kc[i * a->block] = narrow1(key[i]);
            memcpy((uint16_t *)a->vc + to, (const uint16_t *)a->v + from, a->d * sizeof(uint16_t));
        }
    }
}

// One chunk of keys for one query row: online softmax (Milakov and Gimelshein 2018). out [dp] is not yet divided.
#define CHUNK(NAME, TYPE, LOAD)                                                                                        \
    static inline __attribute__((always_inline)) void NAME(const float *q, const TYPE *k, const TYPE *v, int64_t n,    \
                                                           const Attend *a, float *top, float *total, float *out) {    \
        vf s[VK];                                                                                                      \
        for (int j = 0; j < VK; j++) s[j] = (vf){0};                                                                   \
        for (int64_t i = 0; i < a->d; i++) {                                                                           \
            vf x = splat(q[i]);                                                                                        \
            for (int j = 0; j < VK; j++) s[j] = fma_(x, LOAD(k + i * a->block + j * L), s[j]);                            \
        }                                                                                                              \
        float p[KEYS];                                                                                                 \
        memcpy(p, s, sizeof p);                                                                                        \
        for (int64_t j = n; j < KEYS; j++) p[j] = -INFINITY;                                                           \
        vf best = load32(p);                                                                                           \
        for (int j = 1; j < VK; j++) best = max_of(best, load32(p + j * L));                                           \
        float high = *top;                                                                                             \
        for (int j = 0; j < L; j++) high = best[j] > high ? best[j] : high;                                            \
        vf shift = splat(high), part = (vf){0};                                                                        \
        for (int j = 0; j < VK; j++) {                                                                                 \
            vf e = exp_of(load32(p + j * L) - shift);                                                                  \
            part += e;                                                                                                 \
            *(vf *)(p + j * L) = e;                                                                                    \
        }                                                                                                              \
        float old = exp_of(splat(*top - high))[0];                                                                     \
        *total = *total * old + sum(part);                                                                             \
        *top = high;                                                                                                   \
        int64_t at = 0;                                                                                                \
        for (; at + 4 * L <= a->dp; at += 4 * L) {                                                                     \
            vf acc[4];                                                                                                 \
            for (int c = 0; c < 4; c++) acc[c] = load32(out + at + c * L) * old;                                       \
            for (int64_t j = 0; j < n; j++) {                                                                          \
                vf x = splat(p[j]);                                                                                    \
                for (int c = 0; c < 4; c++) acc[c] = fma_(x, LOAD(v + j * a->dp + at + c * L), acc[c]);                \
            }                                                                                                          \
            for (int c = 0; c < 4; c++) *(vf *)(out + at + c * L) = acc[c];                                            \
        }                                                                                                              \
        for (; at < a->dp; at += L) {                                                                                  \
            vf acc = load32(out + at) * old;                                                                           \
            for (int64_t j = 0; j < n; j++) acc = fma_(splat(p[j]), LOAD(v + j * a->dp + at), acc);                    \
            *(vf *)(out + at) = acc;                                                                                   \
        }                                                                                                              \
    }

CHUNK(chunk32, float, load32)
CHUNK(chunk16, uint16_t, load16)

// Tokens [first, last) of one sequence, at consecutive positions, against everything before them; one key/value head.
static void attend_tile(const Attend *a, int64_t first, int64_t last, int64_t g) {
    int64_t ratio = a->heads / a->groups, rows = (last - first) * ratio;
    float q[rows * a->d], top[rows], total[rows], out[rows * a->dp];
    memset(out, 0, sizeof out);
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = first + r / ratio, head = g * ratio + r % ratio;
        rotated(q + r * a->d, a->q, token * a->qs + head * a->d, a, token);
        for (int64_t i = 0; i < a->d; i++) q[r * a->d + i] *= a->scale;
        top[r] = -INFINITY;
        total[r] = 0;
    }
    const int32_t *table = a->tables + a->sequence[first] * a->width;
    int64_t end = a->position[last - 1] + 1;
    for (int64_t start = 0; start < end; start += KEYS) {
        int64_t base = table[start / a->block] * a->groups + g, within = start % a->block;
        int64_t kat = base * a->d * a->block + within, vat = (base * a->block + within) * a->dp;
        for (int64_t r = 0; r < rows; r++) {
            int64_t n = a->position[first + r / ratio] + 1 - start;
            if (n <= 0) continue;
            n = n < KEYS ? n : KEYS;
            float *o = out + r * a->dp;
            if (a->dtype == FP32)
                chunk32(q + r * a->d, (const float *)a->kc + kat, (const float *)a->vc + vat, n, a, top + r, total + r, o);
            else
                chunk16(q + r * a->d, (const uint16_t *)a->kc + kat, (const uint16_t *)a->vc + vat, n, a, top + r,
                        total + r, o);
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = first + r / ratio, head = g * ratio + r % ratio;
        float *o = out + r * a->dp, inverse = 1.0f / total[r];
        for (int64_t i = 0; i < a->d; i++) o[i] *= inverse;
        narrow_row(a->out, o, (token * a->heads + head) * a->d, a->d, a->dtype);
    }
}

// Turn queries and keys by their positions, put keys and values into the cache, attend. Tokens of a sequence stand
// together, in order. out [tokens, heads, d].
void rt_attend(const Attend *a) {
    for (int64_t t = 0; t < a->tokens; t++) store(a, t);
    int64_t *starts = malloc((a->tokens + 1) * sizeof(int64_t)), tiles = 0;
    for (int64_t t = 0; t < a->tokens; t++)
        if (!t || a->sequence[t] != a->sequence[t - 1] || t - starts[tiles - 1] == QUERIES) starts[tiles++] = t;
    starts[tiles] = a->tokens;
#pragma omp parallel for schedule(dynamic) num_threads(a->threads) if (a->threads > 1)
    for (int64_t i = 0; i < tiles * a->groups; i++)
        attend_tile(a, starts[i / a->groups], starts[i / a->groups + 1], i % a->groups);
    free(starts);
}
