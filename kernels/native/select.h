/* Exported by select.c. */
#ifndef SESSIOND_SELECT_H
#define SESSIOND_SELECT_H

#include <stdint.h>

void select_top(uintptr_t scores, int64_t stride, int64_t n_rows, int64_t n, int64_t k, uintptr_t positions,
                uintptr_t room, int n_threads);
#endif
