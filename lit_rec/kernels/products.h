/* Vectors and matrix products of what rerankers compute for short lists, a few lists at a time so that they stay in a
   core's cache. All numbers are float, all matrices lie row by row, sizes are counted in floats. */
#include <stddef.h>

#include <string.h>

/* Numbers in a vector; and how many rows by how many vectors of a product a processor has the registers to sum at once.
   Four by three rather than five by two: more of the instructions multiply, and where another program computes on the
   same core's other thread, instructions are what runs short. */
#if defined(__AVX512F__)
enum { LANES = 16, TALL = 5, WIDE = 4 };
#elif defined(__AVX__)
enum { LANES = 8, TALL = 4, WIDE = 3 };
#else
enum { LANES = 4, TALL = 4, WIDE = 3 };
#endif
typedef ptrdiff_t size;
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline vec load(const float *from) { return *(const vec *)from; }
static inline void store(float *to, vec values) { *(vec *)to = values; }
static inline vec all(float value) { return (vec){0} + value; }
static inline vec where(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
static inline float total(vec values) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += values[lane];
    return sum;
}
static inline size least(size a, size b) { return a < b ? a : b; }
static inline size padded(size n) { return (n + LANES - 1) / LANES * LANES; }

/* Cephes' expf, 2^n times a polynomial; what is not a number stays so. */
static inline vec exponential(vec x) {
    x = where(x < all(-87.0f), all(-87.0f), x);
    x = where(x > all(87.0f), all(87.0f), x);
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: the sum is rounded to a whole number, its lowest bits are n */
    vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (vec)(((ivec)shifted << 23) + (127 << 23));
}
static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }
static inline vec hyperbolic_tangent(vec x) { return 1.0f - 2.0f / (1.0f + exponential(x + x)); }

/* c[rows, vectors * LANES] = first + a b, its sums in registers; a's elements lie a_row and a_step apart. */
#define BLOCK(rows, vectors)                                                                                           \
    static void block_##rows##_##vectors(size k, const float *a, size a_row, size a_step, const float *b, size b_row,  \
                                         const float *first, size first_row, float *c, size c_row, int cut) {          \
        vec sum[rows][vectors], right[vectors];                                                                        \
        for (int i = 0; i < rows; i++)                                                                                 \
            for (int j = 0; j < vectors; j++) sum[i][j] = first ? load(first + i * first_row + j * LANES) : all(0);    \
        _Pragma("GCC unroll 2") for (size step = 0; step < k; step++) {                                                \
            for (int j = 0; j < vectors; j++) right[j] = load(b + step * b_row + j * LANES);                           \
            for (int i = 0; i < rows; i++)                                                                             \
                for (int j = 0; j < vectors; j++) sum[i][j] += a[i * a_row + step * a_step] * right[j];                \
        }                                                                                                              \
        for (int i = 0; i < rows; i++)                                                                                 \
            for (int j = 0; j < vectors; j++)                                                                          \
                store(c + i * c_row + j * LANES, cut ? where(sum[i][j] < all(0), all(0), sum[i][j]) : sum[i][j]);      \
    }
#define BLOCKS(rows) BLOCK(rows, 1) BLOCK(rows, 2) BLOCK(rows, 3)
BLOCKS(1)
BLOCKS(2)
BLOCKS(3)
BLOCKS(4)
typedef void Block(size, const float *, size, size, const float *, size, const float *, size, float *, size, int);
#define NAMES(rows) block_##rows##_1, block_##rows##_2, block_##rows##_3
#if defined(__AVX512F__)
BLOCKS(5)
BLOCK(1, 4)
BLOCK(2, 4)
BLOCK(3, 4)
BLOCK(4, 4)
BLOCK(5, 4)
static Block *const blocks[TALL][WIDE] = {
    {NAMES(1), block_1_4}, {NAMES(2), block_2_4}, {NAMES(3), block_3_4}, {NAMES(4), block_4_4}, {NAMES(5), block_5_4}};
#else
static Block *const blocks[TALL][WIDE] = {{NAMES(1)}, {NAMES(2)}, {NAMES(3)}, {NAMES(4)}};
#endif

/* c[m, n] = first + a[m, k] b[k, n], and no less than zero where it is cut. first: nothing, or rows as far apart as
   told, for one row of all 0. */
static inline void product(size m, size n, size k, const float *a, size a_row, size a_step, const float *b, size b_row,
                    const float *first, size first_row, float *c, size c_row, int cut) {
    for (size j = 0, vectors; j < n; j += vectors * LANES) {
        const size left = (n - j) / LANES;
        vectors = left == WIDE + 1 ? WIDE - 1 : least(left, WIDE); /* a single one is slow */
        for (size i = 0, rows; i < m; i += rows) {
            rows = least(TALL, m - i);
            blocks[rows - 1][vectors - 1](k, a + i * a_row, a_row, a_step, b + j, b_row,
                                          first ? first + i * first_row + j : 0, first_row, c + i * c_row + j, c_row,
                                          cut);
        }
    }
}
/* y[m, n] = x[m, k] w[k, n] + bias, rows one behind the other. */
static inline void linear(size m, size n, size k, const float *x, const float *w, const float *bias, float *y,
                          int cut) {
    product(m, n, k, x, k, 1, w, n, bias, 0, y, n, cut);
}
/* What y = x w' + b hands back of dy [m, n] to w [n, k] and b [n], added to them. */
static inline void linear_back(size m, size n, size k, const float *dy, const float *x, float *dw, float *db) {
    product(n, k, m, dy, 1, n, x, k, dw, k, dw, k, 0);
    for (size i = 0; i < m; i++)
        for (size j = 0; j < n; j += LANES) store(db + j, load(db + j) + load(dy + i * n + j));
}

/* [n, width], rows `row` apart, to [width, P], zeros behind. */
static inline void turn(size n, size width, const float *from, size row, float *to, size P) {
    for (size j = 0; j < width; j++) {
        for (size i = 0; i < n; i++) to[j * P + i] = from[i * row + j];
        memset(to + j * P + n, 0, (P - n) * sizeof(float));
    }
}
/* Of some columns of x [m, P], in place, e to the scale * (x - the highest of its column); share: one over the sums. */
static inline __attribute__((always_inline)) void exponentials_of(int vectors, size m, size P, float scale, float *x,
                                                                  float *share) {
    vec highest[WIDE], sum[WIDE], w;
    for (int i = 0; i < vectors; i++) highest[i] = load(x + i * LANES), sum[i] = all(0);
    for (size j = P; j < m * P; j += P)
        for (int i = 0; i < vectors; i++)
            w = load(x + j + i * LANES), highest[i] = where(w > highest[i], w, highest[i]);
    for (size j = 0; j < m * P; j += P)
        for (int i = 0; i < vectors; i++, sum[i - 1] += w)
            store(x + j + i * LANES, w = exponential((load(x + j + i * LANES) - highest[i]) * scale));
    for (int i = 0; i < vectors; i++) store(share + i * LANES, 1.0f / sum[i]);
}
/* The same of all of them. */
static inline void exponentials(size m, size P, float scale, float *x, float *share) {
    size i = 0;
    for (; i + WIDE * LANES <= P; i += WIDE * LANES) exponentials_of(WIDE, m, P, scale, x + i, share + i);
    for (; i < P; i += LANES) exponentials_of(1, m, P, scale, x + i, share + i);
}
/* softmax(scale * x) down every column of x [m, P]; share [P] is for its own use. */
static inline void softmax(size m, size P, float scale, float *x, float *share) {
    exponentials(m, P, scale, x, share);
    for (size j = 0; j < m * P; j += P)
        for (size i = 0; i < P; i += LANES) store(x + j + i, load(x + j + i) * load(share + i));
}
/* What it hands back of d [m, P], in its place; weights are what it made. */
static inline void softmax_back(size m, size P, float scale, const float *weights, float *d) {
    for (size i = 0; i < P; i += LANES) {
        vec mean = all(0);
        for (size j = i; j < m * P; j += P) mean += load(weights + j) * load(d + j);
        for (size j = i; j < m * P; j += P) store(d + j, load(weights + j) * (load(d + j) - mean) * scale);
    }
}

/* What the threads have summed, added up in the first one's place. */
static inline void gather(int threads, size n, float *sums) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < threads; part++)
        for (int thread = 1; thread < threads; thread++)
            for (size j = n * part / threads; j < n * (part + 1) / threads; j++) sums[j] += sums[thread * n + j];
}
