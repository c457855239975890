/* Exported by pack.c. */
#ifndef SESSIOND_PACK_H
#define SESSIOND_PACK_H

#include <stdint.h>

int64_t pack_exponents(uintptr_t values, int64_t n_groups, int64_t n_tokens, int64_t dim, uintptr_t out,
                       uintptr_t work);
int unpack_exponents(uintptr_t coded, int64_t n_bytes, uintptr_t values, int64_t group_stride, int64_t n_groups,
                     int64_t n_tokens, int64_t dim, int portable);

#endif
