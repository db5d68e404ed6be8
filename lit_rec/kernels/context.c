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
/* A chunk of n lists: x [n, C, D], logits [n, C]; turned [D, padded C] is for its own use. */
static void chunk_forward(size n, const Layers *s, const Ready *w, const float *x, const int *lengths, Kept here,
                          float *logits, float *turned) {
    const size C = s->C, D = s->D, m = n * C, last = room(s, s->layers);
    linear(m, 3 * D, D, x, w->in, s->b_in, here.qkv, 0);
    for (size i = 0; i < n; i++) {
        float *both = here.layer[0] + i * C * 2 * D;
        attend(lengths[i], s, here.qkv + i * C * 3 * D, here.weights + i * s->heads * C * padded(C), both, 2 * D,
               turned);
        for (size j = 0; j < C; j++) {
            if (j >= lengths[i]) memset(both + j * 2 * D, 0, D * sizeof(float));
            memcpy(both + j * 2 * D + D, x + (i * C + j) * D, D * sizeof(float));
        }
    }
    for (size l = 0; l < s->layers; l++)
        linear(m, room(s, l + 1), room(s, l), here.layer[l], w->turned[l], w->b[l], here.layer[l + 1], 1);
    for (size i = 0; i < m; i++) {
        vec sum = all(0);
        for (size j = 0; j < last; j += LANES)
            sum += load(here.layer[s->layers] + i * last + j) * load(w->out + j);
        logits[i] = total(sum) + *s->biases[s->layers];
    }
}
/* From d_logits [n, C] to dx [n, C, D] and, added to them, a thread's sums. */
static void chunk_back(size n, const Layers *s, const Ready *w, const float *x, const int *lengths,
                       const float *d_logits, Kept here, float *dx, float *sums, float *turned) {
    const size C = s->C, D = s->D, m = n * C, last = room(s, s->layers);
    float *d_weights = turned + D * padded(C), *db_in = sums + 3 * D * D, *sum = db_in + 3 * D, *dw[MOST_LAYERS];
    Kept d = context_places(n, s, d_weights + C * padded(C));
    for (size l = 0; l < s->layers; sum += room(s, l + 1) * (room(s, l) + 1), l++) dw[l] = sum;
    for (size i = 0; i < m; i++) {
        const float given = d_logits[i], *out = here.layer[s->layers] + i * last;
        for (size j = 0; j < last; j += LANES) {
            store(sum + j, load(sum + j) + given * load(out + j));
            store(d.layer[s->layers] + i * last + j, given * load(w->out + j));
        }
        sum[last] += given;
    }
    for (size l = s->layers - 1; l >= 0; l--) {
        size to = room(s, l + 1), from = room(s, l);
        float *dy = d.layer[l + 1], *out = here.layer[l + 1];
        for (size j = 0; j < m * to; j += LANES)
            store(dy + j, where(load(out + j) <= all(0), all(0), load(dy + j)));
        linear_back(m, to, from, dy, here.layer[l], dw[l], dw[l] + to * from);
        product(m, from, to, dy, to, 1, w->w[l], from, 0, 0, d.layer[l], from, 0);
    }
    memset(d.qkv, 0, m * 3 * D * sizeof(float));
    for (size i = 0; i < n; i++) {
        const float *both = d.layer[0] + i * C * 2 * D;
        for (size j = 0; j < C; j++) memcpy(dx + (i * C + j) * D, both + j * 2 * D + D, D * sizeof(float));
        attend_back(lengths[i], s, here.qkv + i * C * 3 * D, here.weights + i * s->heads * C * padded(C), both, 2 * D,
                    d.qkv + i * C * 3 * D, d_weights, turned);
    }
    linear_back(m, 3 * D, D, d.qkv, x, sums, db_in);
    product(m, D, 3 * D, d.qkv, 3 * D, 1, s->w_in, D, dx, D, dx, D, 0);
}

/* x [B, C, D]; lengths [B]: a list's candidates, before its padding; logits [B, C]. ready: made here, and wanted on the
   way back. keep and kept as for the GRU. */
void context_forward(const Layers *s, size B, size chunk, int threads, const float *x, const int *lengths, float *ready,
                     float *logits, int keep, float *kept, float *scratch) {
    const size C = s->C;
    const Ready w = make_ready(s, ready);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at);
            Kept here = context_places(n, s, kept + (keep ? at : thread * chunk) * context_kept(s));
            chunk_forward(n, s, &w, x + at * C * s->D, lengths + at, here, logits + at * C,
                          scratch + thread * context_scratch(chunk, s));
        }
}
/* grads: of all weights, in the order of `Layers`; dx [B, C, D]. */
void context_backward(const Layers *s, size B, size chunk, int threads, const float *x, const int *lengths,
                      float *ready, const float *d_logits, float *dx, float *grads, float *sums, float *kept,
                      float *scratch) {
    const size C = s->C, D = s->D;
    Ready w;
    ready_places(s, ready, &w);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at);
            chunk_back(n, s, &w, x + at * C * D, lengths + at, d_logits + at * C,
                       context_places(n, s, kept + at * context_kept(s)), dx + at * C * D,
                       sums + thread * context_sums(s), scratch + thread * context_scratch(chunk, s));
        }
    gather(threads, context_sums(s), sums);
    hand_back(s, &w, sums, grads);
}

/* log(1 + u) for u from 0 to 1: Cephes' logf, of half of it where it is beyond the root of 2. */
static vec log_of_one_and(vec u) {
    const ivec far = u > all(0.41421356f);
    const vec f = where(far, 0.5f * u - 0.5f, u), z = f * f;
    vec p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    return f + (p * f * z - 0.5f * z) + where(far, all(0.69314718f), all(0));
}
/* Binary cross-entropy of lists, summed over their candidates, and in the place of the logits [n, C] its gradient, over
   `count`. Labels above 1 count as 1; padding has no part. */
static double cross_entropy(size n, size C, const int *lengths, const float *labels, float count, float *logits) {
    double sum = 0;
    for (size i = 0; i < n; i++, logits += C, labels += C) {
        for (size j = 0; j < C; j += LANES) {
            const size width = least(LANES, C - j), real = lengths[i] - j;
            float x[LANES] = {0}, y[LANES] = {0}, chosen[LANES] = {0};
            memcpy(x, logits + j, width * sizeof(float)), memcpy(y, labels + j, width * sizeof(float));
            for (size l = 0; l < least(width, real); l++) chosen[l] = 1;
            const vec logit = load(x), label = where(load(y) > all(1), all(1), load(y));
            const vec u = exponential(where(logit < all(0), logit, -logit)), p = where(logit < all(0), u, all(1));
            const vec loss = (1.0f - label) * logit + where(logit < all(0), -logit, all(0)) + log_of_one_and(u);
            sum += total(where(load(chosen) > all(0), loss, all(0)));
            store(x, where(load(chosen) > all(0), (p / (1.0f + u) - label) / count, all(0)));
            memcpy(logits + j, x, width * sizeof(float));
        }
    }
    return sum;
}
/* There and back in one, while what a chunk is made into lies in the cache: the mean binary cross-entropy over all
   candidates, its gradients as above. labels [B, C]; kept: of a chunk per thread. */
float context_bce(const Layers *s, size B, size chunk, int threads, const float *x, const int *lengths,
                  const float *labels, float *ready, float *dx, float *grads, float *sums, float *kept,
                  float *scratch) {
    const size C = s->C, D = s->D;
    const Ready w = make_ready(s, ready);
    size count = 0;
    double loss = 0, losses[threads];
    for (size i = 0; i < B; i++) count += lengths[i];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        losses[thread] = 0;
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at);
            Kept here = context_places(n, s, kept + thread * chunk * context_kept(s));
            float logits[n * C], *turned = scratch + thread * context_scratch(chunk, s);
            chunk_forward(n, s, &w, x + at * C * D, lengths + at, here, logits, turned);
            losses[thread] += cross_entropy(n, C, lengths + at, labels + at * C, count, logits);
            chunk_back(n, s, &w, x + at * C * D, lengths + at, logits, here, dx + at * C * D,
                       sums + thread * context_sums(s), turned);
        }
    }
    for (int thread = 0; thread < threads; thread++) loss += losses[thread]; /* in their order, whoever is done first */
    gather(threads, context_sums(s), sums);
    hand_back(s, &w, sums, grads);
    return loss / count;
}
