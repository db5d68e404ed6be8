/* Self-attention among the candidates of a list, then a perceptron on [attention ; candidate]. */
#include "products.h"

enum { MOST_LAYERS = 16 };
typedef struct {
    size C, D, heads, layers;
    size widths[MOST_LAYERS + 1]; /* of the perceptron's input, 2D, and of its hidden layers */
} Shape;
/* Of a chunk: q k v [n, C, 3D], attention's weights [n, heads, C, padded C] (a row for who is read, a column for who
   reads), the perceptron's input and its hidden layers [n, C, widths[l]]. */
typedef struct { float *qkv, *weights, *layer[MOST_LAYERS + 1]; } Kept;

static Kept context_places(size n, const Shape *s, float *at) {
    Kept kept = {at, at + n * s->C * 3 * s->D, {0}};
    at = kept.weights + n * s->heads * s->C * padded(s->C);
    for (size l = 0; l <= s->layers; at += n * s->C * s->widths[l++]) kept.layer[l] = at;
    return kept;
}
size context_kept(const Shape *s) {
    size sum = s->C * 3 * s->D + s->heads * s->C * padded(s->C);
    for (size l = 0; l <= s->layers; l++) sum += s->C * s->widths[l];
    return sum;
}
/* For a thread's own use: the gradients of what is kept, but for one head's weights, and a head's keys, turned. */
size context_scratch(size chunk, const Shape *s) { return chunk * context_kept(s) + (s->C + s->D) * padded(s->C); }
size context_sums(const Shape *s) {
    size sum = 3 * s->D * (s->D + 1) + s->widths[s->layers] + LANES;
    for (size l = 0; l < s->layers; l++) sum += s->widths[l + 1] * (s->widths[l] + 1);
    return sum;
}

/* One list of c candidates: the weights, and what they read, rows of which are `row` apart. */
static void attend(size c, const Shape *s, const float *qkv, float *weights, float *read, size row, float *turned) {
    const size head = s->D / s->heads, P = padded(s->C), far = 3 * s->D;
    const float scale = 1 / __builtin_sqrtf((float)head);
    for (size h = 0; h < s->heads; h++, weights += s->C * P) {
        const float *q = qkv + h * head, *k = q + s->D, *v = k + s->D;
        turn(c, head, q, far, turned, P);
        product(c, P, head, k, far, 1, turned, P, 0, 0, weights, P, 0);
        softmax(c, P, scale, weights, turned);
        product(c, head, c, weights, 1, P, v, far, 0, 0, read + h * head, row, 0);
    }
}
static void attend_back(size c, const Shape *s, const float *qkv, const float *weights, const float *d_read, size row,
                        float *d_qkv, float *d_weights, float *turned) {
    const size head = s->D / s->heads, P = padded(s->C), far = 3 * s->D;
    const float scale = 1 / __builtin_sqrtf((float)head);
    for (size h = 0; h < s->heads; h++, weights += s->C * P) {
        const float *q = qkv + h * head, *k = q + s->D, *v = k + s->D, *d = d_read + h * head;
        float *dq = d_qkv + h * head, *dk = dq + s->D, *dv = dk + s->D;
        turn(c, head, d, row, turned, P);
        product(c, P, head, v, far, 1, turned, P, 0, 0, d_weights, P, 0);
        product(c, head, c, weights, P, 1, d, row, 0, 0, dv, far, 0);
        softmax_back(c, P, scale, weights, d_weights);
        product(c, head, c, d_weights, 1, P, k, far, 0, 0, dq, far, 0);
        product(c, head, c, d_weights, P, 1, q, far, 0, 0, dk, far, 0);
    }
}
/* x [B, C, D]; lengths [B]: a list's candidates, before its padding; w_in [D, 3D], weights [widths[l], widths[l + 1]],
   all of them torch's, transposed; w_out [widths[layers]]; logits [B, C]. keep and kept as for the GRU. */
void context_forward(const Shape *s, size B, size chunk, int threads, const float *x, const int *lengths,
                     const float *w_in, const float *b_in, const float **weights, const float **biases,
                     const float *w_out, const float *b_out, float *logits, int keep, float *kept, float *scratch) {
    const size C = s->C, D = s->D, last = s->widths[s->layers];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at), m = n * C;
            Kept here = context_places(n, s, kept + (keep ? at : thread * chunk) * context_kept(s));
            float *turned = scratch + thread * context_scratch(chunk, s);
            linear(m, 3 * D, D, x + at * C * D, w_in, b_in, here.qkv, 0);
            for (size i = 0; i < n; i++) {
                float *both = here.layer[0] + i * C * 2 * D;
                attend(lengths[at + i], s, here.qkv + i * C * 3 * D, here.weights + i * s->heads * C * padded(C), both,
                       2 * D, turned);
                for (size j = 0; j < C; j++) {
                    if (j >= lengths[at + i]) memset(both + j * 2 * D, 0, D * sizeof(float));
                    memcpy(both + j * 2 * D + D, x + ((at + i) * C + j) * D, D * sizeof(float));
                }
            }
            for (size l = 0; l < s->layers; l++)
                linear(m, s->widths[l + 1], s->widths[l], here.layer[l], weights[l], biases[l], here.layer[l + 1], 1);
            for (size i = 0; i < m; i++) {
                vec sum = all(0);
                for (size j = 0; j < last; j += LANES) sum += load(here.layer[s->layers] + i * last + j) * load(w_out + j);
                logits[at * C + i] = total(sum) + *b_out;
            }
        }
}
/* w_in [3D, D] and weights [widths[l + 1], widths[l]] as torch has them. sums, per thread: of w_in, b_in, each layer's
   weights and bias, w_out, b_out (the first of LANES). */
void context_backward(const Shape *s, size B, size chunk, int threads, const float *x, const int *lengths,
                      const float *w_in, const float **weights, const float *w_out, const float *d_logits, float *dx,
                      float *sums, float *kept, float *scratch) {
    const size C = s->C, D = s->D, last = s->widths[s->layers];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        float *dw_in = sums + thread * context_sums(s), *db_in = dw_in + 3 * D * D, *sum = db_in + 3 * D;
        float *dw[MOST_LAYERS], *turned = scratch + thread * context_scratch(chunk, s), *d_weights = turned + D * padded(C);
        for (size l = 0; l < s->layers; sum += s->widths[l + 1] * (s->widths[l] + 1), l++) dw[l] = sum;
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at), m = n * C;
            Kept here = context_places(n, s, kept + at * context_kept(s));
            Kept d = context_places(n, s, d_weights + C * padded(C));
            for (size i = 0; i < m; i++) {
                const float given = d_logits[at * C + i], *out = here.layer[s->layers] + i * last;
                for (size j = 0; j < last; j += LANES) {
                    store(sum + j, load(sum + j) + given * load(out + j));
                    store(d.layer[s->layers] + i * last + j, given * load(w_out + j));
                }
                sum[last] += given;
            }
            for (size l = s->layers - 1; l >= 0; l--) {
                size to = s->widths[l + 1], from = s->widths[l];
                float *dy = d.layer[l + 1], *out = here.layer[l + 1];
                for (size j = 0; j < m * to; j += LANES)
                    store(dy + j, where(load(out + j) <= all(0), all(0), load(dy + j)));
                linear_back(m, to, from, dy, here.layer[l], dw[l], dw[l] + to * from);
                product(m, from, to, dy, to, 1, weights[l], from, 0, 0, d.layer[l], from, 0);
            }
            memset(d.qkv, 0, m * 3 * D * sizeof(float));
            for (size i = 0; i < n; i++) {
                const float *both = d.layer[0] + i * C * 2 * D;
                for (size j = 0; j < C; j++)
                    memcpy(dx + ((at + i) * C + j) * D, both + j * 2 * D + D, D * sizeof(float));
                attend_back(lengths[at + i], s, here.qkv + i * C * 3 * D, here.weights + i * s->heads * C * padded(C),
                            both, 2 * D, d.qkv + i * C * 3 * D, d_weights, turned);
            }
            linear_back(m, 3 * D, D, d.qkv, x + at * C * D, dw_in, db_in);
            product(m, D, 3 * D, d.qkv, 3 * D, 1, w_in, D, dx + at * C * D, D, dx + at * C * D, D, 0);
        }
    }
    gather(threads, context_sums(s), sums);
}
