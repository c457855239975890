/* Attention in vectors that every processor has. */
enum { LANES = 4 };
#include "attention_lanes_inline.h"

void attention_plain(const struct attention_piece *piece) { attend(piece); }
