/* Exported by probe.c. */
#ifndef SESSIOND_PROBE_H
#define SESSIOND_PROBE_H

#include <stdint.h>

uint64_t probe_read(uintptr_t data, int64_t n_bytes, int n_threads);
int64_t probe_multiply_adds(int kind, int64_t rounds, uintptr_t sums, int n_threads);
int64_t probe_regions(int64_t n_regions, int64_t n_chunks, int n_threads);

#endif
