/* DLCM: a GRU reads a list's candidates, and every state is scored against the last one's. Both are batch-normalised,
   so lists wait for each other between the GRU and the scores, and on the way back once more. */
#include "gru.h"

typedef struct {
    const float *scale, *shift;
    float *mean, *var; /* the running ones, which training moves */
    float momentum, eps;
} Norm;
typedef struct {
    size C, D, H; /* candidates, width of one, of a state; weights are torch's */
    const float *w_input, *b_input, *w_state, *b_state, *w_final, *b_final, *w_score, *b_score;
    Norm final, state;
} Dlcm;
/* Weights turned; by what rows are normalised: their mean, one over their deviation, and how many they are, or 0 where
   the running ones stand for those of a batch. */
typedef struct { float *w_input, *w_state, *w_final, *final, *state; } Ready;
/* Of a chunk: the GRU's, what scores the states [n, H], and the gradient of the last state's normalised form [n, H]. */
typedef struct { float *states, *gates, *context, *d_final; } Kept;

static size of_rows(const Dlcm *s) { return 2 * s->H + LANES; }
static Ready ready_places(const Dlcm *s, float *at) {
    Ready to = {at, at + 3 * s->H * s->D, 0, 0, 0};
    to.w_final = to.w_state + 3 * s->H * s->H;
    to.final = to.w_final + s->H * s->H;
    to.state = to.final + of_rows(s);
    return to;
}
size dlcm_ready(const Dlcm *s) { return s->H * (3 * s->D + 4 * s->H) + 2 * of_rows(s); }
size dlcm_kept(const Dlcm *s) { return gru_list(s->C, s->H) + 2 * s->H; }
static Kept places(size n, const Dlcm *s, float *at) {
    Kept here = {at, at + n * (s->C + 1) * s->H, 0, 0};
    here.context = here.gates + n * s->C * 4 * s->H;
    here.d_final = here.context + n * s->H;
    return here;
}
/* For a thread's own use: moments of both kinds of rows, then what the GRU needs, and gradients of states. */
size dlcm_scratch(size chunk, const Dlcm *s) {
    return 2 * of_rows(s) + gru_room(chunk, s->C, s->H) + chunk * (s->C + 2) * s->H;
}
/* Per thread, in torch's order of the weights: the GRU's, of the final state's norm and layer, of the states' norm, of
   the score. */
size dlcm_sums(const Dlcm *s) { return gru_weights(s->D, s->H) + s->H * (s->H + 6) + 1; }

static size end_of(int length) { return length ? length : 1; } /* which state is the last one's; 0 is before all */

/* Join the moments of rows to those of others: [mean, squared distances from it, count]. */
static void join(size H, const float *others, float *to) {
    const float more = others[2 * H], n = to[2 * H] + more;
    if (more == 0) return;
    for (size j = 0; j < H; j += LANES) {
        vec apart = load(others + j) - load(to + j);
        store(to + H + j, load(to + H + j) + load(others + H + j) + apart * apart * (to[2 * H] * more / n));
        store(to + j, load(to + j) + apart * (more / n));
    }
    to[2 * H] = n;
}
static void add_rows(size n, const float **rows, size H, float *own, float *to) {
    for (size j = 0; n && j < H; j += LANES) {
        vec mean = all(0), squares = all(0);
        for (size i = 0; i < n; i++) mean += load(rows[i] + j);
        mean /= (float)n;
        for (size i = 0; i < n; i++) squares += (load(rows[i] + j) - mean) * (load(rows[i] + j) - mean);
        store(own + j, mean), store(own + H + j, squares);
    }
    own[2 * H] = n;
    join(H, own, to);
}
static void add_chunk(size n, const Dlcm *s, const int *lengths, const float *states, float *own, float *final,
                      float *state) {
    const float *rows[n * s->C], *ends[n];
    size real = 0;
    for (size i = 0; i < n; i++, states += (s->C + 1) * s->H) {
        ends[i] = states + end_of(lengths[i]) * s->H;
        for (int c = 1; c <= lengths[i]; c++) rows[real++] = states + c * s->H;
    }
    add_rows(n, ends, s->H, own, final);
    add_rows(real, rows, s->H, own, state);
}
/* From moments to what rows are normalised by; a single row has no variance. Whether it is of them. */
static int settle(size H, const Norm *norm, int training, const float *found, float *to) {
    const float n = found[2 * H];
    const int of_batch = training && n > 1;
    for (size j = 0; j < H; j++) {
        to[j] = of_batch ? found[j] : norm->mean[j];
        to[H + j] = 1 / __builtin_sqrtf((of_batch ? found[H + j] / n : norm->var[j]) + norm->eps);
        if (of_batch) {
            norm->mean[j] += norm->momentum * (found[j] - norm->mean[j]);
            norm->var[j] += norm->momentum * (found[H + j] / (n - 1) - norm->var[j]);
        }
    }
    to[2 * H] = of_batch ? n : 0;
    return of_batch;
}

static vec normal(const float *by, size H, const float *row, size j) {
    return (load(row + j) - load(by + j)) * load(by + H + j);
}
/* The last states, normalised, scaled and shifted, to [n, H]. */
static void normalise_ends(size n, const Dlcm *s, const int *lengths, const float *by, const float *states, float *to) {
    for (size i = 0; i < n; i++)
        for (size j = 0; j < s->H; j += LANES)
            store(to + i * s->H + j, normal(by, s->H, states + (i * (s->C + 1) + end_of(lengths[i])) * s->H, j) *
                                         load(s->final.scale + j) + load(s->final.shift + j));
}
static void score_chunk(size n, const Dlcm *s, Ready w, const int *lengths, Kept here, float *logits, float *scratch) {
    const size C = s->C, H = s->H;
    const float *mean = w.state, *narrow = w.state + H;
    normalise_ends(n, s, lengths, w.final, here.states, scratch);
    linear(n, H, H, scratch, w.w_final, s->b_final, here.context, 0);
    for (size j = 0; j < n * H; j += LANES) store(here.context + j, hyperbolic_tangent(load(here.context + j)));
    for (size i = 0; i < n; i++) {
        float weights[H];
        vec sum = all(0);
        for (size j = 0; j < H; j += LANES) {
            vec a = load(s->w_score + j) * load(here.context + i * H + j);
            sum += a * load(s->state.shift + j);
            store(weights + j, a * load(s->state.scale + j) * load(narrow + j));
        }
        const float base = total(sum);
        for (size c = 0; c < C; c++) {
            sum = all(0);
            for (size j = 0; c < lengths[i] && j < H; j += LANES)
                sum += load(weights + j) * (load(here.states + (i * (C + 1) + c + 1) * H + j) - load(mean + j));
            logits[i * C + c] = (c < lengths[i] ? base + total(sum) : 0) + *s->b_score;
        }
    }
}

/* x [B, C, D], lengths [B], logits [B, C]; ready is made here, and wanted on the way back. kept: of all lists where
   there will be a way back (keep) or they wait for each other (training), else of a chunk per thread. Which norms are
   by the batch: 1 the final state's, 2 the states'. */
int dlcm_forward(const Dlcm *s, size B, size chunk, int threads, const float *x, const int *lengths, float *ready,
                 float *logits, int training, int keep, float *kept, float *scratch) {
    const size C = s->C, D = s->D, H = s->H, room = dlcm_scratch(chunk, s), moments = 2 * of_rows(s);
    const Ready w = ready_places(s, ready);
    int of_batch = 0;
    turn(3 * H, D, s->w_input, D, w.w_input, 3 * H);
    turn(3 * H, H, s->w_state, H, w.w_state, 3 * H);
    turn(H, H, s->w_final, H, w.w_final, H);
    for (int thread = 0; thread < threads; thread++) memset(scratch + thread * room, 0, moments * sizeof(float));
    if (!training) settle(H, &s->final, 0, scratch, w.final), settle(H, &s->state, 0, scratch, w.state);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at);
            Kept here = places(n, s, kept + (keep || training ? at : thread * chunk) * dlcm_kept(s));
            float *final = scratch + thread * room, *state = final + of_rows(s), *own = final + moments;
            gru_chunk(n, C, D, H, x + at * C * D, w.w_input, w.w_state, s->b_input, s->b_state, here.states,
                      here.gates, own);
            if (training) add_chunk(n, s, lengths + at, here.states, own, final, state);
            else score_chunk(n, s, w, lengths + at, here, logits + at * C, own);
        }
    if (!training) return 0;
    for (int thread = 1; thread < threads; thread++) {
        join(H, scratch + thread * room, scratch);
        join(H, scratch + thread * room + of_rows(s), scratch + of_rows(s));
    }
    of_batch |= settle(H, &s->final, 1, scratch, w.final);
    of_batch |= settle(H, &s->state, 1, scratch + of_rows(s), w.state) << 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at);
            score_chunk(n, s, w, lengths + at, places(n, s, kept + at * dlcm_kept(s)), logits + at * C,
                        scratch + thread * room);
        }
    return of_batch;
}

/* Where the sums of what follows the GRU stand. */
typedef struct { float *final_scale, *final_shift, *w_final, *b_final, *scale, *shift, *w_score, *b_score; } Sums;
static Sums sums_places(const Dlcm *s, float *at) {
    const size H = s->H;
    at += gru_weights(s->D, H);
    float *behind = at + 2 * H + H * H;
    return (Sums){at, at + H, at + 2 * H, behind, behind + H, behind + 2 * H, behind + 3 * H, behind + 4 * H};
}
static void add(float *to, vec more) { store(to, load(to) + more); }
/* From the logits to the gradients of what the final states have become, and to the sums. */
static void scores_back(size n, const Dlcm *s, Ready w, const int *lengths, const float *d_logits, Kept here, Sums to,
                        float *scratch) {
    const size C = s->C, H = s->H;
    float *ends = scratch, *d = ends + n * H;
    normalise_ends(n, s, lengths, w.final, here.states, ends);
    for (size i = 0; i < n; i++) {
        const float *given = d_logits + i * C;
        float of_list = 0;
        for (size c = 0; c < C; c++) *to.b_score += given[c];
        for (size c = 0; c < lengths[i]; c++) of_list += given[c];
        for (size j = 0; j < H; j += LANES) {
            vec context = load(here.context + i * H + j), weight = load(s->w_score + j), read = all(0);
            for (size c = 0; c < lengths[i]; c++)
                read += given[c] * normal(w.state, H, here.states + (i * (C + 1) + c + 1) * H, j);
            vec d_product = read * load(s->state.scale + j) + of_list * load(s->state.shift + j);
            add(to.w_score + j, context * d_product);
            add(to.scale + j, weight * context * read);
            add(to.shift + j, weight * context * of_list);
            store(d + i * H + j, weight * d_product * (1.0f - context * context));
        }
    }
    linear_back(n, H, H, d, ends, to.w_final, to.b_final);
    product(n, H, H, d, H, 1, s->w_final, H, 0, 0, here.d_final, H, 0);
    for (size i = 0; i < n; i++)
        for (size j = 0; j < H; j += LANES) {
            const float *end = here.states + (i * (C + 1) + end_of(lengths[i])) * H;
            vec d_final = load(here.d_final + i * H + j);
            add(to.final_shift + j, d_final);
            add(to.final_scale + j, d_final * normal(w.final, H, end, j));
        }
}
/* The gradients of states [n, C, H], given those of both norms' scale and shift by all lists: [4, H]. */
static void states_back(size n, const Dlcm *s, Ready w, const int *lengths, const float *d_logits, Kept here,
                        const float *of_all, float *d_states) {
    const size C = s->C, H = s->H;
    const float lists = w.final[2 * H], rows = w.state[2 * H];
    const float per_list = lists ? 1 / lists : 0, per_row = rows ? 1 / rows : 0;
    for (size i = 0; i < n; i++)
        for (size j = 0; j < H; j += LANES) {
            const float *states = here.states + i * (C + 1) * H, *end = states + end_of(lengths[i]) * H;
            vec scale = load(s->state.scale + j) * load(w.state + H + j);
            vec weight = load(s->w_score + j) * load(here.context + i * H + j) * scale;
            vec lean = load(of_all + 2 * H + j) * per_row * scale, push = load(of_all + 3 * H + j) * per_row * scale;
            for (size c = 0; c < C; c++) {
                vec d = d_logits[i * C + c] * weight - push - lean * normal(w.state, H, states + (c + 1) * H, j);
                store(d_states + (i * C + c) * H + j, c < lengths[i] ? d : all(0));
            }
            lean = load(of_all + j) * per_list, push = load(of_all + H + j) * per_list;
            add(d_states + (i * C + end_of(lengths[i]) - 1) * H + j,
                (load(here.d_final + i * H + j) - push - lean * normal(w.final, H, end, j)) *
                    load(s->final.scale + j) * load(w.final + H + j));
        }
}
/* d_logits [B, C] to dx [B, C, D] and to sums, those of all threads in the first one's place. */
void dlcm_backward(const Dlcm *s, size B, size chunk, int threads, const float *x, const int *lengths, float *ready,
                   const float *d_logits, float *dx, float *sums, float *kept, float *scratch) {
    const size C = s->C, D = s->D, H = s->H, each = dlcm_sums(s), room = dlcm_scratch(chunk, s);
    const Ready w = ready_places(s, ready);
    float of_all[4 * H];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at);
            scores_back(n, s, w, lengths + at, d_logits + at * C, places(n, s, kept + at * dlcm_kept(s)),
                        sums_places(s, sums + thread * each), scratch + thread * room);
        }
    memset(of_all, 0, sizeof of_all);
    for (int thread = 0; thread < threads; thread++) {
        Sums from = sums_places(s, sums + thread * each);
        for (size j = 0; j < 2 * H; j += LANES) /* a norm's scale and shift lie one behind the other */
            add(of_all + j, load(from.final_scale + j)), add(of_all + 2 * H + j, load(from.scale + j));
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at);
            Kept here = places(n, s, kept + at * dlcm_kept(s));
            float *d_states = scratch + thread * room + gru_room(chunk, C, H);
            states_back(n, s, w, lengths + at, d_logits + at * C, here, of_all, d_states);
            gru_chunk_back(n, C, D, H, x + at * C * D, s->w_input, s->w_state, d_states, dx + at * C * D,
                           sums + thread * each, here.states, here.gates, scratch + thread * room);
        }
    gather(threads, each, sums);
}
