/* Attention in vectors of AVX2. */
enum { LANES = 8 };
#include "attention_lanes_inline.h"

#if HAVE_X86
AVX2 void attention_avx2(const struct attention_piece *piece) { attend(piece); }
#endif
