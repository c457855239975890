/* System calls that fail on demand, for LD_PRELOAD. Only calls on files below one folder are counted.
 *
 * fault_arm(root, call, k, error, persist, report): the k-th call (from 1) of that class fails with errno `error`; 0
 * stands for a short write: half the bytes are written and their number is returned. With `persist` all later ones fail
 * too. The first failure writes one line with the file's path to the descriptor `report`. call 0 disarms.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, WRITE, SYNC, OPEN, MMAP };

static char root[PATH_MAX];
static size_t root_len;
static int armed, error_number, persist, report_fd = -1;
static long failing;
static atomic_long seen, hits;

void fault_arm(const char *folder, int call, long k, int error, int from_then_on, int report) {
    strncpy(root, folder, sizeof root - 1);
    root_len = strlen(root);
    failing = k, error_number = error, persist = from_then_on, report_fd = report;
    atomic_store(&seen, 0), atomic_store(&hits, 0);
    armed = call;
}

long fault_seen(void) { return atomic_load(&seen); }
long fault_hits(void) { return atomic_load(&hits); }

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int fails_at(int call, const char *path) {
    if (armed != call || strncmp(path, root, root_len) != 0) return 0;
    long n = atomic_fetch_add(&seen, 1) + 1;
    if (n != failing && !(persist && n > failing)) return 0;
    if (atomic_fetch_add(&hits, 1) == 0 && report_fd >= 0) {
        char line[PATH_MAX + 32];
        int length = snprintf(line, sizeof line, "[\"h\", \"%s\"]\n", path + root_len);
        REAL(write);
        if (real(report_fd, line, length) != length) _exit(99);
    }
    return 1;
}

static int fails(int call, int fd) {
    if (armed != call) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fails_at(call, path);
}

/* -1 with errno, or 1: the caller writes half. */
static int refuse(void) {
    if (error_number == 0) return 1;
    errno = error_number;
    return -1;
}

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    if (fails(WRITE, fd)) return refuse() < 0 ? -1 : real(fd, data, n / 2);
    return real(fd, data, n);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    REAL(pwrite);
    if (fails(WRITE, fd)) return refuse() < 0 ? -1 : real(fd, data, n / 2, at);
    return real(fd, data, n, at);
}

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { return pwrite(fd, data, n, at); }

ssize_t pwritev(int fd, const struct iovec *parts, int n_parts, off_t at) {
    REAL(pwritev);
    if (fails(WRITE, fd)) return refuse() < 0 ? -1 : real(fd, parts, n_parts > 1 ? n_parts / 2 : 1, at);
    return real(fd, parts, n_parts, at);
}

ssize_t pwritev64(int fd, const struct iovec *parts, int n_parts, off64_t at) { return pwritev(fd, parts, n_parts, at); }

int fsync(int fd) {
    REAL(fsync);
    return fails(SYNC, fd) ? refuse() : real(fd);
}

int fdatasync(int fd) {
    REAL(fdatasync);
    return fails(SYNC, fd) ? refuse() : real(fd);
}

static int open_mode(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; }

int open(const char *path, int flags, ...) {
    REAL(open);
    va_list rest;
    va_start(rest, flags);
    int mode = open_mode(flags, rest);
    va_end(rest);
    return fails_at(OPEN, path) ? refuse() : real(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int mode = open_mode(flags, rest);
    va_end(rest);
    return open(path, flags, mode);
}

int openat(int folder, const char *path, int flags, ...) {
    REAL(openat);
    va_list rest;
    va_start(rest, flags);
    int mode = open_mode(flags, rest);
    va_end(rest);
    return fails_at(OPEN, path) ? refuse() : real(folder, path, flags, mode);
}

void *mmap(void *address, size_t n, int protection, int flags, int fd, off_t at) {
    REAL(mmap);
    if (fd >= 0 && fails(MMAP, fd)) return errno = error_number ? error_number : ENOMEM, MAP_FAILED;
    return real(address, n, protection, flags, fd, at);
}

void *mmap64(void *address, size_t n, int protection, int flags, int fd, off64_t at) {
    return mmap(address, n, protection, flags, fd, at);
}
