/* A clock that only goes forward. */
#ifndef SESSIOND_CLOCK_INLINE_H
#define SESSIOND_CLOCK_INLINE_H

#include <time.h>

#include "native.h"

INLINE int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

#endif
