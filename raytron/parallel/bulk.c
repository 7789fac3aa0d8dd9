// Weights from one memory to another, with their checksums, in one pass (see bulk.py; the sum is that of checksum.py).
//
// A job is a number of rows of whole 64-bit words, a part those of its rows that are in one block. A row is copied and
// then summed up while it is in the first-level cache: summing costs little on top of the copy, where a second pass over
// the memory would cost as much again.

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef struct {
    uint64_t *to;
    const uint64_t *from;
    const uint64_t *rows_weight, *words_weight;  // null: no sum is wanted
    int64_t words, to_stride, from_stride;       // in words
    uint64_t sum;                                // out
    int64_t differs;                             // out: a row without a sum is not what it was taken from
} Job;

typedef struct { int64_t job, row, stop, block; } Part;

#define RUN 2048  // words copied at once where rows follow one another: what the first-level cache holds

enum { WRITE, WRITE_CHANGED, TAKE };

static uint64_t dot(const uint64_t *x, const uint64_t *w, int64_t n) {
    uint64_t a = 0, b = 0, c = 0, d = 0;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        a += x[i] * w[i];
        b += x[i + 1] * w[i + 1];
        c += x[i + 2] * w[i + 2];
        d += x[i + 3] * w[i + 3];
    }
    for (; i < n; i++) a += x[i] * w[i];
    return a + b + c + d;
}

// memcpy past the cache: what is written is not read here again, and need not be read before it is written.
static void stream(uint64_t *to, const uint64_t *from, int64_t n) {
    int64_t i = 0;
#if defined(__AVX2__)
    if ((uintptr_t)to % 32 == 0)
        for (; i + 4 <= n; i += 4)
            _mm256_stream_si256((__m256i *)(to + i), _mm256_loadu_si256((const __m256i *)(from + i)));
#endif
    memcpy(to + i, from + i, (n - i) * 8);
}

static int same(const Job *j, const Part *p) {
    for (int64_t row = p->row; row < p->stop; row++)
        if (memcmp(j->to + row * j->to_stride, j->from + row * j->from_stride, j->words * 8)) return 0;
    return 1;
}

// WRITE copies and marks every block with `turn`, WRITE_CHANGED those that differ; TAKE copies blocks marked later than
// `turn`. The sum is of `from` when writing, of `to` when taking.
static void carry_out(Job *j, const Part *p, int64_t *mark, int64_t turn, int mode) {
    int copy = mode == WRITE || (mode == TAKE ? *mark > turn : !same(j, p));
    if (copy && mode != TAKE) __atomic_store_n(mark, turn, __ATOMIC_RELAXED);  // ranks share blocks
    int whole = j->to_stride == j->words && j->from_stride == j->words;
    int64_t rows = whole && j->words < RUN ? RUN / j->words : 1;
    uint64_t sum = 0;
    for (int64_t row = p->row; row < p->stop; row++) {
        uint64_t *to = j->to + row * j->to_stride;
        const uint64_t *from = j->from + row * j->from_stride;
        if (copy && (row - p->row) % rows == 0) {
            int64_t n = (rows < p->stop - row ? rows : p->stop - row) * j->words;
            if (mode == TAKE) memcpy(to, from, n * 8);
            else stream(to, from, n);
        }
        if (j->rows_weight) sum += j->rows_weight[row] * dot(mode == TAKE ? to : from, j->words_weight, j->words);
        else if (mode == TAKE && memcmp(to, from, j->words * 8)) __atomic_store_n(&j->differs, 1, __ATOMIC_RELAXED);
    }
#if defined(__AVX2__)
    _mm_sfence();
#endif
    __atomic_fetch_add(&j->sum, sum, __ATOMIC_RELAXED);
}

void rt_carry_out(Job *jobs, int64_t count, const Part *parts, int64_t n, int64_t *turns, int64_t turn, int mode,
                  int threads) {
    for (int64_t i = 0; i < count; i++) jobs[i].sum = jobs[i].differs = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++) carry_out(jobs + parts[i].job, parts + i, turns + parts[i].block, turn, mode);
}
