/* Exported by runtime.c; sources_digest by what build.py writes around the kernels. */
#ifndef SESSIOND_RUNTIME_H
#define SESSIOND_RUNTIME_H

#include <stdint.h>

int isa_here(void);
void limit_isa(int most);
int has_avx512_vbmi2(void);
const char *sources_digest(void);

#endif
