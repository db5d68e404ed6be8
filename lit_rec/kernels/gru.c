/* The states of a GRU over the candidates of a list. */
#include "gru.h"

size gru_kept(size C, size H) { return gru_list(C, H); }
size gru_scratch(size chunk, size C, size H) { return gru_room(chunk, C, H); }

/* x [B, C, D], w_input [D, 3H] and w_state [H, 3H] (torch's, transposed), out [B, C, H]. kept: of all lists where there
   will be a way back (keep), else of a chunk per thread. */
void gru_forward(size B, size C, size D, size H, size chunk, int threads, const float *x, const float *w_input,
                 const float *w_state, const float *b_input, const float *b_state, float *out, int keep, float *kept,
                 float *scratch) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at);
            float *states = kept + (keep ? at : thread * chunk) * gru_list(C, H), *gates = states + n * (C + 1) * H;
            gru_chunk(n, C, D, H, x + at * C * D, w_input, w_state, b_input, b_state, states, gates,
                      scratch + thread * gru_room(chunk, C, H));
            for (size i = 0; i < n; i++)
                memcpy(out + (at + i) * C * H, states + (i * (C + 1) + 1) * H, C * H * sizeof(float));
        }
}
/* w_input [3H, D] and w_state [3H, H] as torch has them. sums, per thread: of w_input, b_input, w_state, b_state. */
void gru_backward(size B, size C, size D, size H, size chunk, int threads, const float *x, const float *w_input,
                  const float *w_state, const float *d_out, float *dx, float *sums, const float *kept, float *scratch) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (size at = B * thread / threads, end = B * (thread + 1) / threads; at < end; at += chunk) {
            size n = least(chunk, end - at);
            const float *states = kept + at * gru_list(C, H);
            gru_chunk_back(n, C, D, H, x + at * C * D, w_input, w_state, d_out + at * C * H, dx + at * C * D,
                           sums + thread * gru_weights(D, H), states, states + n * (C + 1) * H,
                           scratch + thread * gru_room(chunk, C, H));
        }
    gather(threads, gru_weights(D, H), sums);
}
