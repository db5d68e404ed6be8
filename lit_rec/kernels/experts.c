/* Experts weighed by a gate: sum over e of gate_e relu(W2_e relu(W1_e x + b1_e) + b2_e), gate = softmax(W x + b).

   Here a matrix has a row per feature and a column per input, so that hidden widths need not be multiples of LANES. */
#include "products.h"

enum { INPUTS = 128 / (WIDE * LANES) * WIDE * LANES }; /* taken at a time */
typedef struct {
    size count, row;                     /* experts; how far the rows of their first weights are apart */
    const float *w1, *b1, *w2, *b2;      /* [count, hidden, row], [count, hidden], [count, out, hidden], [count, out] */
} Stack;
typedef struct {
    size n, width, hidden, out;          /* inputs; widths of an input, of an expert's hidden layer and of its output */
    const float *gate_w, *gate_b;        /* [experts, width], [experts] */
    Stack stacks[2];                     /* the experts, in the order of the gate */
} Experts;
/* Of a chunk of n inputs: the hidden layers [experts * hidden, padded n], the outputs [experts * out, padded n], the
   gate [experts, padded n]. */
typedef struct { float *hidden, *outs, *gate; } Mixed;

static size experts(const Experts *s) { return s->stacks[0].count + s->stacks[1].count; }
static Mixed mixed_places(size n, const Experts *s, float *at) {
    float *outs = at + experts(s) * s->hidden * padded(n);
    return (Mixed){at, outs, outs + experts(s) * s->out * padded(n)};
}
static size kept_per_input(const Experts *s) { return experts(s) * (s->hidden + s->out + 1); }
/* Kept of all inputs where there will be a way back (keep), else of a chunk per thread. */
size experts_kept(const Experts *s, int threads, int keep) {
    return (keep ? padded(s->n) : threads * INPUTS) * kept_per_input(s);
}
/* For a thread's own use: a chunk's inputs or the gradient of its hidden layers, that of the gate, and three times as
   much as one output. */
size experts_scratch(const Experts *s) {
    size most = experts(s) * s->hidden;
    return INPUTS * ((most > s->width ? most : s->width) + experts(s) + 3 * s->out);
}
size experts_sums(const Experts *s) {
    return experts(s) * (s->hidden * (s->width + 1 + s->out) + s->out + s->width + 1);
}
/* Where a thread's inputs begin: with a whole vector. */
static size experts_begin(const Experts *s, int thread, int threads) {
    return least(s->n, thread * padded((s->n + threads - 1) / threads));
}

/* y[m, n] = w[m, k] x[k, n] + bias, w's rows `row` apart, n a multiple of LANES. */
static void layer(size m, size n, size k, const float *w, size row, const float *bias, const float *x, float *y,
                  int cut) {
    for (size i = 0; i < m; i++)
        for (size j = 0; j < n; j += LANES) store(y + i * n + j, all(bias[i]));
    product(m, n, k, w, row, 1, x, n, y, n, y, n, cut);
}
/* Of each row of [m, n] the sum, added to a bias' gradient. */
static void add_up(size m, size n, const float *rows, float *to) {
    for (size i = 0; i < m; i++) {
        vec sum = all(0);
        for (size j = 0; j < n; j += LANES) sum += load(rows + i * n + j);
        to[i] += total(sum);
    }
}
/* x [n, width]; y [n, out]. */
void experts_forward(const Experts *s, int threads, const float *x, float *y, int keep, float *kept, float *scratch) {
    const size D = s->width, H = s->hidden, O = s->out;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        float *turned = scratch + thread * experts_scratch(s), *sum = turned + D * INPUTS;
        const size end = experts_begin(s, thread + 1, threads);
        for (size at = experts_begin(s, thread, threads); at < end; at += INPUTS) {
            size n = least(INPUTS, end - at), P = padded(n), first = 0;
            Mixed here = mixed_places(n, s, kept + (keep ? at : thread * INPUTS) * kept_per_input(s));
            turn(n, D, x + at * D, D, turned, P);
            for (const Stack *stack = s->stacks; stack < s->stacks + 2; first += stack++->count) {
                layer(stack->count * H, P, D, stack->w1, stack->row, stack->b1, turned, here.hidden + first * H * P, 1);
                for (size e = 0; e < stack->count; e++)
                    layer(O, P, H, stack->w2 + e * O * H, H, stack->b2 + e * O, here.hidden + (first + e) * H * P,
                          here.outs + (first + e) * O * P, 1);
            }
            layer(first, P, D, s->gate_w, D, s->gate_b, turned, here.gate, 0);
            softmax(first, P, 1, here.gate, sum);
            for (size o = 0; o < O; o++)
                for (size j = 0; j < P; j += LANES) {
                    vec mix = all(0);
                    for (size e = 0; e < first; e++)
                        mix += load(here.gate + e * P + j) * load(here.outs + (e * O + o) * P + j);
                    store(sum + o * P + j, mix);
                }
            turn(O, n, sum, P, y + at * O, O);
        }
    }
}
/* sums, per thread: of the first weights [experts, hidden, width] and biases, of the second weights, turned [experts,
   hidden, out], and biases, of the gate's weights and bias. */
void experts_backward(const Experts *s, int threads, const float *x, const float *dy, float *sums, float *kept,
                      float *scratch) {
    const size D = s->width, H = s->hidden, O = s->out, E = experts(s);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        const size end = experts_begin(s, thread + 1, threads);
        float *dw1 = sums + thread * experts_sums(s), *db1 = dw1 + E * H * D, *dw2 = db1 + E * H;
        float *db2 = dw2 + E * H * O, *d_gate_w = db2 + E * O, *d_gate_b = d_gate_w + E * D;
        float *d_hidden = scratch + thread * experts_scratch(s), *d_gate = d_hidden + E * H * INPUTS;
        float *given = d_gate + E * INPUTS, *d_out = given + O * INPUTS, *d_rows = d_out + O * INPUTS;
        for (size at = experts_begin(s, thread, threads); at < end; at += INPUTS) {
            size n = least(INPUTS, end - at), P = padded(n), first = 0;
            Mixed here = mixed_places(n, s, kept + at * kept_per_input(s));
            turn(n, O, dy + at * O, O, given, P);
            for (const Stack *stack = s->stacks; stack < s->stacks + 2; first += stack++->count)
                for (size e = first; e < first + stack->count; e++) {
                    const float *out = here.outs + e * O * P, *hidden = here.hidden + e * H * P;
                    float *dh = d_hidden + e * H * P;
                    for (size j = 0; j < P; j += LANES) {
                        vec sum = all(0), weight = load(here.gate + e * P + j);
                        for (size o = 0; o < O; o++) {
                            vec made = load(out + o * P + j), d = load(given + o * P + j);
                            sum += d * made;
                            store(d_out + o * P + j, where(made <= all(0), all(0), weight * d));
                        }
                        store(d_gate + e * P + j, sum);
                    }
                    add_up(O, P, d_out, db2 + e * O);
                    turn(O, n, d_out, P, d_rows, O);
                    product(H, O, n, hidden, P, 1, d_rows, O, dw2 + e * H * O, O, dw2 + e * H * O, O, 0);
                    product(H, P, O, stack->w2 + (e - first) * O * H, 1, H, d_out, P, 0, 0, dh, P, 0);
                    for (size j = 0; j < H * P; j += LANES)
                        store(dh + j, where(load(hidden + j) <= all(0), all(0), load(dh + j)));
                }
            add_up(E * H, P, d_hidden, db1);
            product(E * H, D, n, d_hidden, P, 1, x + at * D, D, dw1, D, dw1, D, 0);
            softmax_back(E, P, 1, here.gate, d_gate);
            add_up(E, P, d_gate, d_gate_b);
            product(E, D, n, d_gate, P, 1, x + at * D, D, d_gate_w, D, d_gate_w, D, 0);
        }
    }
    gather(threads, experts_sums(s), sums);
}
