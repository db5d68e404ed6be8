/* Self-attention among the candidates of a list, then a perceptron on [attention ; candidate]. */
#include "products.h"

enum { MOST_LAYERS = 16 };
typedef struct {
    size C, D, heads, layers;                     /* candidates, width of one, attention heads, hidden layers */
    size widths[MOST_LAYERS + 1];                 /* of the perceptron's input, 2D, and of its hidden layers */
    const float *w_in, *b_in, *w_read, *b_read;   /* of queries, keys and values [3D, D], and of what attention reads */
    const float *weights[MOST_LAYERS + 1], *biases[MOST_LAYERS + 1]; /* of the hidden layers, and of the output */
} Layers;
/* The weights as the products want them: those of what is read multiplied into the first hidden layer's, so that
   candidates go through one matrix; widths up to whole vectors; turned, and those of hidden layers as they are, too. */
typedef struct { float *in, *read, *w[MOST_LAYERS], *turned[MOST_LAYERS], *b[MOST_LAYERS], *out; } Ready;
/* Of a chunk: q k v [n, C, 3D], attention's weights [n, heads, C, padded C] (a row for who is read, a column for who
   reads), the perceptron's input and its hidden layers [n, C, room(l)]. */
typedef struct { float *qkv, *weights, *layer[MOST_LAYERS + 1]; } Kept;

static size room(const Layers *s, size l) { return padded(s->widths[l]); }
static float *ready_places(const Layers *s, float *at, Ready *ready) {
    ready->in = at, at += 3 * s->D * s->D;
    ready->read = at, at += s->D * s->D;
    for (size l = 0; l < s->layers; at += room(s, l++ + 1)) {
        ready->w[l] = at, at += room(s, l + 1) * room(s, l);
        ready->turned[l] = at, at += room(s, l + 1) * room(s, l);
        ready->b[l] = at;
    }
    ready->out = at;
    return at + room(s, s->layers);
}
size context_ready(const Layers *s) {
    Ready ready;
    float *begin = 0;
    return ready_places(s, begin, &ready) - begin;
}
static Kept context_places(size n, const Layers *s, float *at) {
    Kept kept = {at, at + n * s->C * 3 * s->D, {0}};
    at = kept.weights + n * s->heads * s->C * padded(s->C);
    for (size l = 0; l <= s->layers; at += n * s->C * room(s, l++)) kept.layer[l] = at;
    return kept;
}
size context_kept(const Layers *s) {
    size sum = s->C * 3 * s->D + s->heads * s->C * padded(s->C);
    for (size l = 0; l <= s->layers; l++) sum += s->C * room(s, l);
    return sum;
}
/* For a thread's own use: the gradients of what is kept, but for one head's weights, and a head's keys, turned. */
size context_scratch(size chunk, const Layers *s) { return chunk * context_kept(s) + (s->C + s->D) * padded(s->C); }
/* Per thread: of w_in, b_in, each hidden layer's weights and bias, as they are when ready, of the output's. */
size context_sums(const Layers *s) {
    size sum = 3 * s->D * (s->D + 1) + room(s, s->layers) + LANES;
    for (size l = 0; l < s->layers; l++) sum += room(s, l + 1) * (room(s, l) + 1);
    return sum;
}
/* How many candidates every list has, before its padding; 0 where padding stands between candidates. */
int lengths_of(size B, size C, const unsigned char *mask, int *lengths) {
    for (size i = 0; i < B; i++, mask += C) {
        size c = 0, most = C;
        while (c < C && mask[c]) c++;
        while (most > c && !mask[most - 1]) most--;
        if (most > c) return 0;
        lengths[i] = c;
    }
    return 1;
}

static Ready make_ready(const Layers *s, float *at) {
    const size D = s->D;
    Ready to;
    memset(at, 0, (ready_places(s, at, &to) - at) * sizeof(float));
    turn(3 * D, D, s->w_in, D, to.in, 3 * D);
    turn(D, D, s->w_read, D, to.read, D);
    for (size l = 0; l < s->layers; l++) {
        const size m = s->widths[l + 1], n = s->widths[l], row = room(s, l);
        memcpy(to.b[l], s->biases[l], m * sizeof(float));
        for (size i = 0; i < m; i++) memcpy(to.w[l] + i * row, s->weights[l] + i * n, n * sizeof(float));
        if (l == 0) {
            product(m, D, D, s->weights[0], row, 1, s->w_read, D, 0, 0, to.w[0], row, 0);
            for (size i = 0; i < m; i++)
                for (size j = 0; j < D; j++) to.b[0][i] += s->weights[0][i * row + j] * s->b_read[j];
        }
        turn(m, row, to.w[l], row, to.turned[l], room(s, l + 1));
    }
    memcpy(to.out, s->weights[s->layers], s->widths[s->layers] * sizeof(float));
    return to;
}
/* The gradients of torch's weights, one behind the other in the order of `Layers`, of those of the ones made ready. */
static void hand_back(const Layers *s, const Ready *ready, const float *sums, float *to) {
    const size D = s->D, last = s->widths[s->layers];
    float *d_read = to + 3 * D * (D + 1);
    memcpy(to, sums, 3 * D * (D + 1) * sizeof(float));
    sums += 3 * D * (D + 1), to = d_read + D * (D + 1);
    for (size l = 0; l < s->layers; l++) {
        const size m = s->widths[l + 1], n = s->widths[l], row = room(s, l);
        const float *db = sums + room(s, l + 1) * row;
        for (size i = 0; i < m; i++) memcpy(to + i * n, sums + i * row, n * sizeof(float));
        if (l == 0) {
            product(D, D, m, s->weights[0], 1, row, sums, row, 0, 0, d_read, D, 0);
            product(1, D, m, db, m, 1, s->weights[0], row, 0, 0, d_read + D * D, D, 0);
            for (size i = 0; i < m; i++)
                for (size j = 0; j < D; j++) to[i * row + j] = db[i] * s->b_read[j];
            product(m, D, D, sums, row, 1, ready->read, D, to, row, to, row, 0);
        }
        memcpy(to + m * n, db, m * sizeof(float));
        to += m * (n + 1), sums += room(s, l + 1) * (row + 1);
    }
    memcpy(to, sums, last * sizeof(float));
    to[last] = sums[room(s, s->layers)];
}

/* One list of c candidates: the weights, and what they read, rows of which are `row` apart. */
static void attend(size c, const Layers *s, const float *qkv, float *weights, float *read, size row, float *turned) {
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
static void attend_back(size c, const Layers *s, const float *qkv, const float *weights, const float *d_read, size row,
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
/* x [B, C, D]; lengths [B]: a list's candidates, before its padding; logits [B, C]. ready: made here, and wanted on the
   way back. keep and kept as for the GRU. */
void context_forward(const Layers *s, size B, size chunk, int threads, const float *x, const int *lengths, float *ready,
                     float *logits, int keep, float *kept, float *scratch) {
    const size C = s->C, D = s->D, last = room(s, s->layers);
    const Ready w = make_ready(s, ready);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at), m = n * C;
            Kept here = context_places(n, s, kept + (keep ? at : thread * chunk) * context_kept(s));
            float *turned = scratch + thread * context_scratch(chunk, s);
            linear(m, 3 * D, D, x + at * C * D, w.in, s->b_in, here.qkv, 0);
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
                linear(m, room(s, l + 1), room(s, l), here.layer[l], w.turned[l], w.b[l], here.layer[l + 1], 1);
            for (size i = 0; i < m; i++) {
                vec sum = all(0);
                for (size j = 0; j < last; j += LANES)
                    sum += load(here.layer[s->layers] + i * last + j) * load(w.out + j);
                logits[at * C + i] = total(sum) + *s->biases[s->layers];
            }
        }
}
/* grads: of all weights, in the order of `Layers`; dx [B, C, D]. */
void context_backward(const Layers *s, size B, size chunk, int threads, const float *x, const int *lengths,
                      float *ready, const float *d_logits, float *dx, float *grads, float *sums, float *kept,
                      float *scratch) {
    const size C = s->C, D = s->D, last = room(s, s->layers);
    Ready w;
    ready_places(s, ready, &w);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        float *dw_in = sums + thread * context_sums(s), *db_in = dw_in + 3 * D * D, *sum = db_in + 3 * D;
        float *turned = scratch + thread * context_scratch(chunk, s), *d_weights = turned + D * padded(C);
        float *dw[MOST_LAYERS];
        for (size l = 0; l < s->layers; sum += room(s, l + 1) * (room(s, l) + 1), l++) dw[l] = sum;
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at), m = n * C;
            Kept here = context_places(n, s, kept + at * context_kept(s));
            Kept d = context_places(n, s, d_weights + C * padded(C));
            for (size i = 0; i < m; i++) {
                const float given = d_logits[at * C + i], *out = here.layer[s->layers] + i * last;
                for (size j = 0; j < last; j += LANES) {
                    store(sum + j, load(sum + j) + given * load(out + j));
                    store(d.layer[s->layers] + i * last + j, given * load(w.out + j));
                }
                sum[last] += given;
            }
            for (size l = s->layers - 1; l >= 0; l--) {
                size to = room(s, l + 1), from = room(s, l);
                float *dy = d.layer[l + 1], *out = here.layer[l + 1];
                for (size j = 0; j < m * to; j += LANES)
                    store(dy + j, where(load(out + j) <= all(0), all(0), load(dy + j)));
                linear_back(m, to, from, dy, here.layer[l], dw[l], dw[l] + to * from);
                product(m, from, to, dy, to, 1, w.w[l], from, 0, 0, d.layer[l], from, 0);
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
            product(m, D, 3 * D, d.qkv, 3 * D, 1, s->w_in, D, dx + at * C * D, D, dx + at * C * D, D, 0);
        }
    }
    gather(threads, context_sums(s), sums);
    hand_back(s, &w, sums, grads);
}
