/* A GRU over the candidates of some lists, forward and back; what kernels that have one are made of. */
#include "products.h"

/* Kept per list: states before every candidate and after the last [C + 1, H], and r, z, n, the state's share of n
   [C, 4H]. */
static inline size gru_list(size C, size H) { return (C + 1) * H + C * 4 * H; }
/* For a thread's own use: both shares of the gates, the gradient of a state, states before. */
static inline size gru_room(size chunk, size C, size H) { return chunk * (2 * C * 3 * H + H + C * H); }
/* Of w_input, b_input, w_state, b_state. */
static inline size gru_weights(size D, size H) { return 3 * H * (D + 1 + H + 1); }

/* n lists: x [n, C, D], states [n, C + 1, H], gates [n, C, 4H]. */
static void gru_chunk(size n, size C, size D, size H, const float *x, const float *w_input, const float *w_state,
                      const float *b_input, const float *b_state, float *states, float *gates, float *scratch) {
    float *input = scratch, *state = scratch + n * C * 3 * H;
    linear(n * C, 3 * H, D, x, w_input, b_input, input, 0);
    for (size i = 0; i < n; i++) memset(states + i * (C + 1) * H, 0, H * sizeof(float));
    for (size t = 0; t < C; t++) {
        product(n, 3 * H, H, states + t * H, (C + 1) * H, 1, w_state, 3 * H, b_state, 0, state, 3 * H, 0);
        for (size i = 0; i < n; i++) {
            const float *a = input + (i * C + t) * 3 * H, *b = state + i * 3 * H;
            float *gate = gates + (i * C + t) * 4 * H, *h = states + (i * (C + 1) + t) * H;
            for (size j = 0; j < H; j += LANES) {
                vec r = sigmoid(load(a + j) + load(b + j)), z = sigmoid(load(a + H + j) + load(b + H + j));
                vec share = load(b + 2 * H + j), fresh = hyperbolic_tangent(load(a + 2 * H + j) + r * share);
                store(gate + j, r), store(gate + H + j, z), store(gate + 2 * H + j, fresh);
                store(gate + 3 * H + j, share);
                store(h + H + j, fresh + z * (load(h + j) - fresh));
            }
        }
    }
}
/* From d_out [n, C, H] to dx [n, C, D] and, added to them, `sums` of the weights. w_input [3H, D] and w_state [3H, H]
   as torch has them. */
static void gru_chunk_back(size n, size C, size D, size H, const float *x, const float *w_input, const float *w_state,
                           const float *d_out, float *dx, float *sums, const float *states, const float *gates,
                           float *scratch) {
    float *dw_input = sums, *db_input = dw_input + 3 * H * D;
    float *dw_state = db_input + 3 * H, *db_state = dw_state + 3 * H * H;
    float *d_input = scratch, *d_state = d_input + n * C * 3 * H;
    float *dh = d_state + n * C * 3 * H, *before = dh + n * H;
    memset(dh, 0, n * H * sizeof(float));
    for (size t = C - 1; t >= 0; t--) {
        for (size i = 0; i < n; i++) {
            const float *gate = gates + (i * C + t) * 4 * H, *old = states + (i * (C + 1) + t) * H;
            const float *given = d_out + (i * C + t) * H;
            float *a = d_input + (i * C + t) * 3 * H, *b = d_state + (i * C + t) * 3 * H, *d = dh + i * H;
            for (size j = 0; j < H; j += LANES) {
                vec r = load(gate + j), z = load(gate + H + j), fresh = load(gate + 2 * H + j);
                vec e = load(d + j) + load(given + j);
                vec dn = e * (1.0f - z) * (1.0f - fresh * fresh);
                vec dz = e * (load(old + j) - fresh) * z * (1.0f - z);
                vec dr = dn * load(gate + 3 * H + j) * r * (1.0f - r);
                store(a + j, dr), store(a + H + j, dz), store(a + 2 * H + j, dn);
                store(b + j, dr), store(b + H + j, dz), store(b + 2 * H + j, dn * r);
                store(d + j, e * z);
            }
        }
        if (t) product(n, H, 3 * H, d_state + t * 3 * H, C * 3 * H, 1, w_state, H, dh, H, dh, H, 0);
    }
    for (size i = 0; i < n; i++) memcpy(before + i * C * H, states + i * (C + 1) * H, C * H * sizeof(float));
    linear_back(n * C, 3 * H, D, d_input, x, dw_input, db_input);
    linear_back(n * C, 3 * H, H, d_state, before, dw_state, db_state);
    product(n * C, D, 3 * H, d_input, 3 * H, 1, w_input, D, 0, 0, dx, D, 0);
}
