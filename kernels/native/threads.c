/* The threads that kernels share: workers that spin for a moment behind every region, then sleep.

   A region ends when its chunks are done, not when all threads have arrived as in OpenMP: a worker that the system has
   put off, for a network thread say, is not waited for. A step has hundreds of regions, each some ten microseconds. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>

#include "clock_inline.h"
#include "native.h"

enum { MOST_WORKERS = 255 };
/* A worker takes its processor from others for as long as the next region is likely to come; a caller at the end of a
   region goes to sleep when its worker seems to have lost its processor, which leaves that one the caller's. */
#define SPIN_NS 30000
#define LINGER_NS 200000

/* Regions are numbered: even while chunks can be taken, odd while the next one is prepared. */
static struct {
    _Atomic uint64_t ticket; /* number << 32 | next chunk */
    _Atomic(chunk_fn) fn;
    _Atomic(void *) arg;
    _Atomic int64_t n_chunks, done;
    _Atomic int n_workers, arrived, asleep, caller_asleep, caller_cpu;
    int started;
    atomic_flag taken;
    pthread_mutex_t lock;
    pthread_cond_t work, end;
} pool = {.taken = ATOMIC_FLAG_INIT, .lock = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER,
          .end = PTHREAD_COND_INITIALIZER};

static inline uint32_t number_of(uint64_t ticket) { return (uint32_t)(ticket >> 32); }

static inline void relax(void) {
#if HAVE_X86
    _mm_pause();
#endif
}

static void take_chunks(uint32_t number) {
    chunk_fn fn = atomic_load_explicit(&pool.fn, memory_order_relaxed);
    void *arg = atomic_load_explicit(&pool.arg, memory_order_relaxed);
    const int64_t n = atomic_load_explicit(&pool.n_chunks, memory_order_relaxed);
    /* If these are of a later region, the ticket has another number by now, and nothing can be taken. */
    atomic_thread_fence(memory_order_acquire);
    int64_t taken = 0;
    uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_relaxed);
    while (number_of(ticket) == number && (int64_t)(uint32_t)ticket < n)
        if (atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1)) {
            fn(arg, (int64_t)(uint32_t)ticket);
            taken++;
            ticket = atomic_load_explicit(&pool.ticket, memory_order_relaxed);
        }
    if (taken && atomic_fetch_add(&pool.done, taken) + taken == n && atomic_load(&pool.caller_asleep)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_signal(&pool.end);
        pthread_mutex_unlock(&pool.lock);
    }
}

static int is_open(uint64_t ticket, uint32_t seen) { return number_of(ticket) != seen && number_of(ticket) % 2 == 0; }

/* The number of a region other than `seen`. */
static uint32_t next_region(uint32_t seen) {
    uint64_t ticket;
    const int64_t began = nanoseconds();
    for (int64_t waited = 0; waited < LINGER_NS; waited = nanoseconds() - began) {
        for (int i = 0; i < 32; i++) {
            if (is_open(ticket = atomic_load(&pool.ticket), seen)) return number_of(ticket);
            relax();
        }
        if (waited > SPIN_NS) sched_yield();
    }
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.asleep, 1);
    while (!is_open(ticket = atomic_load(&pool.ticket), seen)) pthread_cond_wait(&pool.work, &pool.lock);
    atomic_fetch_sub(&pool.asleep, 1);
    pthread_mutex_unlock(&pool.lock);
    return number_of(ticket);
}

static int this_cpu(void) {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

/* The system likes to wake a thread where its waker runs, which has no time for it. */
static void leave_callers_cpu(void) {
#ifdef __linux__
    cpu_set_t mine, others;
    int cpu = this_cpu();
    if (cpu < 0 || cpu != atomic_load_explicit(&pool.caller_cpu, memory_order_relaxed)) return;
    if (sched_getaffinity(0, sizeof mine, &mine)) return;
    others = mine;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) && !sched_setaffinity(0, sizeof others, &others)) sched_setaffinity(0, sizeof mine, &mine);
#endif
}

static void *worker(void *index) {
    for (uint32_t seen = 0;;) {
        seen = next_region(seen);
        if ((intptr_t)index >= atomic_load_explicit(&pool.n_workers, memory_order_relaxed)) continue;
        leave_callers_cpu();
        atomic_store_explicit(&pool.arrived, 1, memory_order_relaxed);
        take_chunks(seen);
    }
    return NULL;
}

/* In a process that was forked off there are no workers, and nobody ends a region that was under way. */
static void forget_workers(void) {
    atomic_store(&pool.ticket, (uint64_t)(number_of(atomic_load(&pool.ticket)) | 1) << 32);
    pool.started = 0;
    atomic_store(&pool.asleep, 0), atomic_store(&pool.caller_asleep, 0);
    pthread_mutex_init(&pool.lock, NULL), pthread_cond_init(&pool.work, NULL), pthread_cond_init(&pool.end, NULL);
    atomic_flag_clear(&pool.taken);
}

static void start_workers(int n) {
    static int watched;
    if (!watched) watched = 1, pthread_atfork(NULL, NULL, forget_workers);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's threads */
    for (pthread_t thread; pool.started < n; pool.started++) {
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)pool.started)) break; /* fewer are enough */
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void wait_for_end(int64_t n) {
    const int64_t began = nanoseconds();
    while (atomic_load(&pool.done) < n) {
        for (int i = 0; i < 32 && atomic_load(&pool.done) < n; i++) relax();
        if (nanoseconds() - began < SPIN_NS) continue;
        pthread_mutex_lock(&pool.lock);
        atomic_store(&pool.caller_asleep, 1);
        while (atomic_load(&pool.done) < n) pthread_cond_wait(&pool.end, &pool.lock);
        atomic_store(&pool.caller_asleep, 0);
        pthread_mutex_unlock(&pool.lock);
    }
}

void parallel_chunks(chunk_fn fn, void *arg, int64_t n_chunks, int n_threads) {
    int n_workers = n_threads - 1 < n_chunks - 1 ? n_threads - 1 : (int)(n_chunks - 1);
    if (n_workers > MOST_WORKERS) n_workers = MOST_WORKERS;
    /* Whoever finds the workers taken, by another thread or a region that this call is part of, computes alone. */
    if (n_workers < 1 || n_chunks >= INT32_MAX || atomic_flag_test_and_set(&pool.taken)) {
        for (int64_t chunk = 0; chunk < n_chunks; chunk++) fn(arg, chunk);
        return;
    }
    if (pool.started < n_workers) start_workers(n_workers);
    const uint32_t number = (number_of(atomic_load(&pool.ticket)) | 1) + 1;
    atomic_store_explicit(&pool.ticket, (uint64_t)(number - 1) << 32, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    atomic_store_explicit(&pool.fn, fn, memory_order_relaxed);
    atomic_store_explicit(&pool.arg, arg, memory_order_relaxed);
    atomic_store_explicit(&pool.n_chunks, n_chunks, memory_order_relaxed);
    atomic_store_explicit(&pool.n_workers, n_workers, memory_order_relaxed);
    atomic_store_explicit(&pool.caller_cpu, this_cpu(), memory_order_relaxed);
    atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
    atomic_store(&pool.ticket, (uint64_t)number << 32);
    int alone = !atomic_exchange_explicit(&pool.arrived, 0, memory_order_relaxed); /* in the last region */
    if (atomic_load(&pool.asleep)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.work);
        pthread_mutex_unlock(&pool.lock);
        alone = 1;
    }
    if (alone) sched_yield(); /* a worker may be waiting for this processor: let it go to another */
    take_chunks(number);
    wait_for_end(n_chunks);
    atomic_flag_clear(&pool.taken);
}
