/* Attention within texts of a frozen encoder: every token reads all of its text's. */
#include <stdint.h>

#include "products.h"

enum { QUERIES = 64 }; /* taken at a time: their weights stay in the cache */
typedef union { float number; uint32_t bits; } Bits;

/* [n, width], rows `row` apart, of floats or (half) of bfloat16, to floats one behind the other. */
static void widen(size n, size width, int half, const void *from, size row, float *to) {
    const uint16_t *upper = from;
    for (size i = 0; i < n; i++, to += width, upper += row) {
        if (!half) memcpy(to, (const float *)from + i * row, width * sizeof(float));
        for (size j = 0; half && j < width; j++) to[j] = (Bits){.bits = (uint32_t)upper[j] << 16}.number;
    }
}
/* To the nearest, of two that are as near to the even one. */
static inline uint16_t narrowed(float number) {
    uint32_t bits = (Bits){number}.bits;
    return number == number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}
/* For a thread's own use: keys and values, weights, queries, twice, what they read, and what to multiply it with. */
size attention_scratch(size L, size D) { return 2 * L * D + QUERIES * (L + 3 * D + 1); }

/* queries, keys, values, out [B, L, H, D], floats or (half) bfloat16; lengths [B]: a text's tokens, before padding. */
void attention(size B, size L, size H, size D, int threads, int half, float scale, const int *lengths,
               const void *queries, const void *keys, const void *values, void *out, float *scratch) {
    const size wide = half ? sizeof(uint16_t) : sizeof(float), row = H * D;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        float *k = scratch + thread * attention_scratch(L, D), *v = k + L * D, *weights = v + L * D;
        float *rows = weights + L * QUERIES, *q = rows + QUERIES * D, *read = q + QUERIES * D;
        float *share = read + QUERIES * D;
        for (size at = B * H * thread / threads; at < B * H * (thread + 1) / threads; at++) {
            size n = lengths[at / H], begin = at / H * L * row + at % H * D;
            widen(n, D, half, (const char *)keys + begin * wide, row, k);
            widen(n, D, half, (const char *)values + begin * wide, row, v);
            for (size first = 0; first < L; first += QUERIES) {
                size m = least(QUERIES, L - first), P = padded(m), place = begin + first * row;
                widen(m, D, half, (const char *)queries + place * wide, row, rows);
                turn(m, D, rows, D, q, P);
                product(n, P, D, k, D, 1, q, P, 0, 0, weights, P, 0);
                exponentials(n, P, scale, weights, share);
                product(D, P, n, v, 1, D, weights, P, 0, 0, read, P, 0);
                for (size i = 0; i < m; i++)
                    for (size j = 0; j < D; j++) {
                        float number = read[j * P + i] * share[i];
                        if (half) ((uint16_t *)out)[place + i * row + j] = narrowed(number);
                        else ((float *)out)[place + i * row + j] = number;
                    }
            }
        }
    }
}
