// Weights from one memory to another, with their checksums, in one pass (see bulk.py; the sum is that of checksum.py).
//
// A job is a number of rows of whole 64-bit words, a part those of its rows that are in one block. A word is loaded
// once, summed up in a register and stored from there: summing costs nothing on top of the copy, and what is summed is
// what is stored, whatever becomes of the source meanwhile. Stores go past the cache: what is written is not read here
// again, and need not be read before it is written, which saves a third of a copy's traffic.
//
// Parts are taken in the order of their blocks, by threads that end with the call. Not by OpenMP's: those keep spinning
// for milliseconds when they have nothing to do, on the cores that the other side of a push needs; a pool that spins
// from before (torch's) is ended first, and is made again when torch next wants it.

#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
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

// How one side of a push keeps pace with the other (see progress.py). `reached[8 * i]` is of writer i.
typedef struct {
    int64_t *reached;
    const int64_t *given_up;
    int64_t turn, begin;             // the push, and the value of `reached` at its begin
    int64_t limit;                   // writing: no block from here on is reported
    int64_t writers, patience_ns;    // taking: how many are waited for; how long, while none of them moves
} Pace;

#define MOST 128  // threads

enum { WRITE, WRITE_CHANGED, TAKE };
enum { DONE, GIVEN_UP, LATE };

typedef struct {
    Job *jobs;
    const Part *parts;
    int64_t n, *turns, turn;
    int mode, threads, status;
    const Pace *pace;
    int64_t next, *at;  // at[8 * i]: thread i has not yet done this part, nor those after it
} Run;

typedef struct { Run *run; int number; } Thread;

typedef uint64_t Words __attribute__((vector_size(64), aligned(8), may_alias));

static inline uint64_t total(Words x) { return x[0] + x[1] + x[2] + x[3] + x[4] + x[5] + x[6] + x[7]; }

static inline void put(uint64_t *to, Words x) {  // to: on a cache line
#if defined(__AVX512F__)
    _mm512_stream_si512((void *)to, (__m512i)x);
#elif defined(__AVX2__)
    __m256i half[2];
    memcpy(half, &x, 64);
    _mm256_stream_si256((__m256i *)to, half[0]);
    _mm256_stream_si256((__m256i *)to + 1, half[1]);
#else
    *(Words *)to = x;
#endif
}

static uint64_t dot(const uint64_t *x, const uint64_t *w, int64_t n) {
    Words s = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) s += *(const Words *)(x + i) * *(const Words *)(w + i);
    uint64_t sum = total(s);
    for (; i < n; i++) sum += x[i] * w[i];
    return sum;
}

static uint64_t copy_dot(uint64_t *to, const uint64_t *from, const uint64_t *w, int64_t n) {
    Words s = {0};
    uint64_t sum = 0;
    int64_t i = 0;
#define ONE() { uint64_t x = from[i]; to[i] = x; sum += x * w[i]; }
    for (; i < n && (uintptr_t)(to + i) % 64; i++) ONE()
    for (; i + 8 <= n; i += 8) {
        Words x = *(const Words *)(from + i);
        put(to + i, x);
        s += x * *(const Words *)(w + i);
    }
    for (; i < n; i++) ONE()
#undef ONE
    return sum + total(s);
}

static void copy(uint64_t *to, const uint64_t *from, int64_t n) {
    int64_t i = 0;
    for (; i < n && (uintptr_t)(to + i) % 64; i++) to[i] = from[i];
    for (; i + 8 <= n; i += 8) put(to + i, *(const Words *)(from + i));
    for (; i < n; i++) to[i] = from[i];
}

// The sum of x, and whether it differs from y.
static uint64_t dot_differs(const uint64_t *x, const uint64_t *y, const uint64_t *w, int64_t n, int *differs) {
    Words s = {0}, d = {0};
    uint64_t sum = 0, rest = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        Words v = *(const Words *)(x + i);
        s += v * *(const Words *)(w + i);
        d |= v ^ *(const Words *)(y + i);
    }
    for (; i < n; i++) sum += x[i] * w[i], rest |= x[i] ^ y[i];
    *differs = (rest | d[0] | d[1] | d[2] | d[3] | d[4] | d[5] | d[6] | d[7]) != 0;
    return sum + total(s);
}

// WRITE copies and marks every block with `turn`, WRITE_CHANGED those only that differ, from the first row that does;
// TAKE copies blocks that are marked later than `turn`. The sum is of what `to` holds then. A mark comes before what it
// is of: a writer that dies in between leaves blocks that are taken in vain, and none that is passed over.
static void carry_out(Job *j, const Part *p, int64_t *mark, int64_t turn, int mode) {
    int copies = mode == WRITE || (mode == TAKE && __atomic_load_n(mark, __ATOMIC_RELAXED) > turn);
    if (mode == WRITE) __atomic_store_n(mark, turn, __ATOMIC_RELAXED);  // ranks share blocks
    uint64_t sum = 0;
    for (int64_t row = p->row; row < p->stop; row++) {
        uint64_t *to = j->to + row * j->to_stride, part = 0;
        const uint64_t *from = j->from + row * j->from_stride, *w = j->words_weight;
        if (copies) {
            if (w) part = copy_dot(to, from, w, j->words);
            else copy(to, from, j->words);
        } else if (mode == WRITE_CHANGED) {
            if (w) part = dot_differs(from, to, w, j->words, &copies);
            else copies = memcmp(to, from, j->words * 8) != 0;
            if (copies) {
                __atomic_store_n(mark, turn, __ATOMIC_RELAXED);
                copy(to, from, j->words);
            }
        } else if (w) {
            part = dot(to, w, j->words);
        } else if (memcmp(to, from, j->words * 8)) {
            __atomic_store_n(&j->differs, 1, __ATOMIC_RELAXED);
        }
        if (w) sum += j->rows_weight[row] * part;
    }
#if defined(__AVX2__)
    _mm_sfence();  // before anybody is told
#endif
    __atomic_fetch_add(&j->sum, sum, __ATOMIC_RELAXED);
}

// Writing: thread `me` is at part `at` now. Report the blocks before the first part that is not done.
static void report(Run *r, int me, int64_t at) {
    const Pace *pace = r->pace;
    __atomic_store_n(r->at + 8 * me, at, __ATOMIC_RELEASE);
    int64_t first = r->n;
    for (int i = 0; i < r->threads; i++) {
        int64_t other = __atomic_load_n(r->at + 8 * i, __ATOMIC_ACQUIRE);
        if (other < first) first = other;
    }
    int64_t block = first < r->n && r->parts[first].block < pace->limit ? r->parts[first].block : pace->limit;
    int64_t seen = __atomic_load_n(pace->reached, __ATOMIC_RELAXED);
    while (seen < pace->begin + block && !__atomic_compare_exchange_n(pace->reached, &seen, pace->begin + block, 0,
                                                                      __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {}
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// Taking: until every writer has written a block. Asleep in between: the cores are the writers'.
static int await_block(const Pace *pace, int64_t block) {
    int64_t begun = 0, last = 0;
    for (int64_t i = 0; i < pace->writers;) {
        int64_t seen = __atomic_load_n(pace->reached + 8 * i, __ATOMIC_ACQUIRE);
        if (seen > pace->begin + block) {
            i++;
            continue;
        }
        if (__atomic_load_n(pace->given_up, __ATOMIC_RELAXED) >= pace->turn) return GIVEN_UP;
        if (!begun || seen != last) begun = now_ns(), last = seen;
        else if (now_ns() - begun > pace->patience_ns) return LATE;
        nanosleep(&(struct timespec){0, 50000}, 0);
    }
    return DONE;
}

static void *work(void *argument) {
    Thread *me = argument;
    Run *r = me->run;
    for (;;) {
        int64_t i = __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED);
        if (r->pace && r->mode != TAKE) report(r, me->number, i < r->n ? i : r->n);
        if (i >= r->n || __atomic_load_n(&r->status, __ATOMIC_RELAXED)) return 0;
        const Part *part = r->parts + i;
        int status = r->pace && r->mode == TAKE ? await_block(r->pace, part->block) : DONE;
        if (status) {
            __atomic_store_n(&r->status, status, __ATOMIC_RELAXED);
            return 0;
        }
        carry_out(r->jobs + part->job, part, r->turns + part->block, r->turn, r->mode);
    }
}

extern int omp_pause_resource_all(int kind) __attribute__((weak));

// DONE; when taking also GIVEN_UP or LATE, and then not all has been taken.
int rt_carry_out(Job *jobs, int64_t count, const Part *parts, int64_t n, int64_t *turns, int64_t turn, int mode,
                 int threads, const Pace *pace) {
    Run run = {.jobs = jobs, .parts = parts, .n = n, .turns = turns, .turn = turn, .mode = mode, .pace = pace};
    for (int64_t i = 0; i < count; i++) jobs[i].sum = jobs[i].differs = 0;
    if (threads > n) threads = n > 0 ? n : 1;
    if (threads > MOST) threads = MOST;
    pthread_t started[MOST];
    Thread each[MOST];
    int64_t at[8 * MOST] = {0};
    run.at = at, run.threads = threads;
    if (threads > 1 && omp_pause_resource_all) omp_pause_resource_all(1);
    int made = 1;
    for (int i = 0; i < threads; i++) each[i] = (Thread){&run, i};
    while (made < threads && !pthread_create(started + made, 0, work, each + made)) made++;
    for (int i = made; i < threads; i++) __atomic_store_n(at + 8 * i, n, __ATOMIC_RELEASE);
    work(each);
    for (int i = 1; i < made; i++) pthread_join(started[i], 0);
    if (pace && mode != TAKE) report(&run, 0, n);  // two threads that ended at once may not have seen each other
    return run.status;
}
