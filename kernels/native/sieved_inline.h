/* Between decoder.c and sieved.c. */
#ifndef SESSIOND_SIEVED_INLINE_H
#define SESSIOND_SIEVED_INLINE_H

#include "sieved.h"

/* Lets sieve choose for a session's one token, whose key `whole` shows at its position: 1, and what it attends to in
   `chosen`; 0: to all. `room`: sieved_room() words. */
int sieved_choose(struct sieved *sieved, int64_t layer, const struct attention_shape *shape,
                  const struct attention_span *whole, struct chosen_span *chosen, uintptr_t room, int n_threads);
int64_t sieved_room(const struct sieved *sieved, int64_t n_layers, const struct attention_shape *shape,
                    int64_t position);
/* With the largest choice that sieve may make: the memory for attention that suffices for every layer. */
void sieved_most(const struct sieved *sieved, int64_t n_layers, const struct attention_span *whole,
                 struct chosen_span *chosen);

#endif
