/* A linear layer of a frozen model: many rows, weights that are rearranged once. */
#include "products.h"

enum { PANEL = WIDE * LANES, ROWS = 12 * TALL, DEPTH = 256 }; /* so much of x, and of a panel, stays in the cache */

/* Weights [n, k] in panels of PANEL outputs, [k, PANEL] each, zeros behind the last. */
size dense_packed(size n, size k) { return (n + PANEL - 1) / PANEL * PANEL * k; }
void dense_pack(size n, size k, const float *w, float *to) {
    for (size j = 0; j < n; j += PANEL) turn(least(PANEL, n - j), k, w + j * k, k, to + j * k, PANEL);
}

/* x times the standard normal's cumulated density; the error function after Abramowitz and Stegun, 7.1.26. */
static inline vec gelu(vec x) {
    const ivec sign = (ivec)x & ((ivec){0} + (-0x7fffffff - 1));
    vec z = (vec)((ivec)x ^ sign) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec erf = (vec)((ivec)(1.0f - p * t * exponential(-z * z)) ^ sign);
    return 0.5f * x * (1.0f + erf);
}
/* y[m, n] = x[m, k] w' + bias, and GELU of it where it is wanted; n is a multiple of LANES. */
void dense(size m, size n, size k, int threads, const float *x, const float *packed, const float *bias, int then_gelu,
           float *y) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size at = 0; at < m; at += ROWS) {
        const size count = least(ROWS, m - at);
        for (size j = 0; j < n; j += PANEL) {
            const size width = least(PANEL, n - j);
            float *to = y + at * n + j;
            for (size step = 0; step < k; step += DEPTH)
                product(count, width, least(DEPTH, k - step), x + at * k + step, k, 1, packed + j * k + step * PANEL,
                        PANEL, step ? to : bias ? bias + j : 0, step ? n : 0, to, n, 0);
            for (size i = 0; then_gelu && i < count; i++)
                for (size l = 0; l < width; l += LANES) store(to + i * n + l, gelu(load(to + i * n + l)));
        }
    }
}
