/* Embeddings of items and their attributes. */
#include <stdint.h>

#include "products.h"

int lanes(void) { return LANES; }
int tall(void) { return TALL; }

typedef struct {
    size n, dim, columns, bags;   /* places, width of an embedding, columns of `values`, attributes */
    size item_rows, value_rows;   /* of the tables */
    const int64_t *items, *values, *ends; /* [n]; [items, columns]; where each attribute's columns end. 0: padding */
} Named;

/* Beside each other per place: the item's embedding, and for every attribute the mean of its values', or zeros. Whether
   all are in the tables. */
int embed_forward(const Named *s, int threads, const float *item_table, const float *value_table, float *out) {
    int known = 1;
    for (size i = 0; i < s->n; i++) {
        int64_t item = s->items[i];
        known &= item >= 0 && item < s->item_rows;
        for (size column = 0; known && column < s->columns; column++) {
            int64_t value = s->values[item * s->columns + column];
            known &= value >= 0 && value < s->value_rows;
        }
    }
    if (!known) return 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size i = 0; i < s->n; i++) {
        float *to = out + i * (1 + s->bags) * s->dim;
        const int64_t *value = s->values + s->items[i] * s->columns;
        memcpy(to, item_table + s->items[i] * s->dim, s->dim * sizeof(float));
        for (size bag = 0, column = 0; bag < s->bags; bag++) {
            float count = 0;
            memset(to += s->dim, 0, s->dim * sizeof(float));
            for (; column < s->ends[bag]; column++) {
                if (!value[column]) continue;
                const float *from = value_table + value[column] * s->dim;
                for (size j = 0; j < s->dim; j += LANES) store(to + j, load(to + j) + load(from + j));
                count++;
            }
            for (size j = 0; count > 1 && j < s->dim; j += LANES) store(to + j, load(to + j) / count);
        }
    }
    return 1;
}
/* Added to the tables' gradients: one thread has those of items, one those of values. */
void embed_backward(const Named *s, int threads, const float *d_out, float *d_items, float *d_values) {
#pragma omp parallel for num_threads(threads < 2 ? 1 : 2) schedule(static)
    for (int part = 0; part < 2; part++)
        for (size i = 0; i < s->n; i++) {
            const float *from = d_out + i * (1 + s->bags) * s->dim;
            const int64_t *value = s->values + s->items[i] * s->columns;
            float *to = d_items + s->items[i] * s->dim;
            for (size j = 0; part == 0 && s->items[i] && j < s->dim; j += LANES)
                store(to + j, load(to + j) + load(from + j));
            for (size bag = 0, first = 0; part == 1 && bag < s->bags; first = s->ends[bag++]) {
                float count = 0;
                from += s->dim;
                for (size column = first; column < s->ends[bag]; column++) count += value[column] != 0;
                for (size column = first; column < s->ends[bag]; column++) {
                    to = d_values + value[column] * s->dim;
                    for (size j = 0; value[column] && j < s->dim; j += LANES)
                        store(to + j, load(to + j) + load(from + j) / count);
                }
            }
        }
}
