/* A step of sieve in one layer (policies/sieve.py): the new key joins the index, the index says what is read. */
#include "clock_inline.h"
#include "keycodes.h"
#include "sieve.h"
#include "sieved_inline.h"

/* One token at `whole`'s position over k chosen ones and its turn's own. */
static struct chosen_span span_of(const struct attention_span *whole, int64_t turn_start, uintptr_t positions, int64_t k) {
    struct chosen_rows keys = {.rows = whole->keys, .stride = whole->group_stride};
    struct chosen_rows values = {.rows = whole->values, .stride = whole->group_stride};
    return (struct chosen_span){
        .query = whole->query, .out = whole->out, .chosen = positions,
        .own_keys = whole->keys, .own_values = whole->values,
        .head_stride = whole->query_head, .token_stride = whole->query_row, .chosen_stride = k,
        .own_keys_stride = whole->group_stride, .own_values_stride = whole->group_stride,
        .n_new = 1, .n_chosen = k, .own_start = turn_start, .own_end = whole->position + 1,
        .keys = keys, .values = values};
}

int sieved_choose(struct sieved *sieved, int64_t layer, const struct attention_shape *shape,
                  const struct attention_span *whole, struct chosen_span *chosen, uintptr_t room, int n_threads) {
    const struct sieve_index *index = (const struct sieve_index *)sieved->indexes + layer;
    int64_t *positions = (int64_t *)sieved->positions + layer * sieved->stride, *counts = (int64_t *)sieved->counts;
    counts[layer] = -1;
    if (!index->tiles) return 0;
    const int64_t began = nanoseconds(), dim = shape->head_dim, last = whole->position;
    key_codes_pack(whole->keys + 2 * last * dim, 1, whole->group_stride, dim, index->tiles, index->group_stride,
                   shape->n_groups, last, 1, dim, (int)index->bits, 1);
    int64_t k = sieve_choose(index->tiles, index->group_stride, whole->query, 1, shape->n_groups, shape->n_share, dim,
                             (int)index->bits, last + 1, sieved->turn_start, shape->scaling, 0, 0, 0, sieved->tie,
                             sieved->nothing, index->mass, index->least, index->most, (uintptr_t)positions, room,
                             n_threads);
    counts[layer] = k;
    sieved->nanoseconds += nanoseconds() - began;
    if (k >= sieved->turn_start) return 0;
    *chosen = span_of(whole, sieved->turn_start, (uintptr_t)positions, k);
    return 1;
}

static int64_t most_of(const struct sieved *sieved, int64_t n_layers) {
    int64_t most = 0;
    for (int64_t i = 0; i < n_layers; i++) {
        const struct sieve_index *index = (const struct sieve_index *)sieved->indexes + i;
        if (index->tiles && index->most > most) most = index->most;
    }
    return most < sieved->turn_start ? most : sieved->turn_start;
}

int64_t sieved_room(const struct sieved *sieved, int64_t n_layers, const struct attention_shape *shape,
                    int64_t position) {
    int64_t most = most_of(sieved, n_layers);
    return sieve_room(shape->n_groups, shape->n_share, position + 1, most > 1 ? most : 1);
}

void sieved_most(const struct sieved *sieved, int64_t n_layers, const struct attention_span *whole,
                 struct chosen_span *chosen) {
    *chosen = span_of(whole, sieved->turn_start, 0, most_of(sieved, n_layers));
}
