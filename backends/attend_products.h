// What a call of the kernel is given, and the two products of an attention.
//
// A form says in which precision they are computed.  Queries and probabilities are transposed, one query a lane; a lane holds
// a word, of one number or of two neighbours that one instruction multiplies.  A number may be the sum of several parts.
#pragma once
#include <cstring>

#include "attend_vectors.h"

namespace {

struct Strides { int64_t batch, head, row, col; };  // in elements; 0 where an axis is broadcast

struct Arguments {
    const void *q, *k, *v;  // all of Form::Number, as out is
    const float *bias, *sinks;
    const uint8_t *mask, *selected;
    const int32_t *q_segments, *kv_segments;  // [batches or 1, length]; none: all queries see all keys
    const uint8_t *pairs;                     // [heads or 1, query segment, key segment]; none: equal segments of at least 0
    const int32_t *moved;                     // [batches or 1, q_len]: as order, for every head; none: order
    void *out;
    float *top, *log_sum;
    int64_t batches, heads, q_len, kv_len, head_dim, value_dim;
    Strides q_at, k_at, v_at, bias_at, sinks_at, mask_at, selected_at;
    Strides q_segments_at, kv_segments_at, pairs_at;  // as [batch, 1, row, 1]; pairs as [1, head, query segment, key segment]
    Strides moved_at;
    Strides out_at, row_at;
    const int32_t *kv_of_head, *layout_of_head;
    const int64_t *row_ptr;  // [layouts, rows + 1]
    const int32_t *cols, *tile;
    const uint64_t *tiles;  // [distinct, 64]: for each key, a bit for each query that sees it
    const int32_t *order;   // [layouts, q_len]: which query stands at each place of the block rows
    float scale, softcap;   // softcap 0: none
    int32_t threads, form, is_float16;  // or bfloat16; where the form is not single precision
};

inline int64_t rounded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// NK keys: the sums over the words of a head.
template <class Form, int NK>
inline void scores(const float *q, const typename Form::Number *k, int64_t step, int64_t words, float *s) {
    Vec sum[NK][VECTORS] = {};
    const int64_t size = rounded(words, LANES);
    for (int part = 0; part < Form::PARTS * Form::PARTS; part++) {  // all with all
        const float *x = q + part / Form::PARTS * size * GROUP;
        const typename Form::Number *y = k + part % Form::PARTS * size * Form::IN_WORD;
        for (int64_t d = 0; d < words; d++)
            for (int j = 0; j < NK; j++)
                for (int n = 0; n < VECTORS; n++)
                    sum[j][n] = Form::product(sum[j][n], at(x, d, n), Form::word(y + j * step + d * Form::IN_WORD));
    }
    for (int j = 0; j < NK; j++)
        for (int n = 0; n < VECTORS; n++) at(s, j, n) = sum[j][n];
}

template <class Form, int NK>
void some_scores(int keys, const float *q, const typename Form::Number *k, int64_t step, int64_t words, float *s) {
    if (keys == NK) return scores<Form, NK>(q, k, step, words, s);
    if constexpr (NK > 1) some_scores<Form, NK - 1>(keys, q, k, step, words, s);
}

template <class Form>
void all_scores(int keys, const float *q, const typename Form::Number *k, int64_t step, int64_t words, float *s) {
    for (int j = 0; j < keys; j += KEYS)
        some_scores<Form, KEYS>(keys - j < KEYS ? keys - j : KEYS, q, k + j * step, step, words, s + j * GROUP);
}

// ND features: the sums over the words of keys.
template <class Form, int ND>
inline void mix(int keys, const float *p, const typename Form::Number *v, int64_t step, float *o) {
    Vec sum[ND][VECTORS];
    for (int d = 0; d < ND; d++)
        for (int n = 0; n < VECTORS; n++) sum[d][n] = at(o, d, n);
    int j = 0;
    for (; (j + 1) * Form::IN_WORD <= keys; j++)
        for (int d = 0; d < ND; d++)
            for (int n = 0; n < VECTORS; n++)
                sum[d][n] = Form::product(sum[d][n], at(p, j, n), Form::word(Form::value(v, step, j, d)));
    if (j * Form::IN_WORD < keys)
        for (int d = 0; d < ND; d++)
            for (int n = 0; n < VECTORS; n++)
                sum[d][n] = Form::product(sum[d][n], at(p, j, n), Form::last_word(Form::value(v, step, j, d)));
    for (int d = 0; d < ND; d++)
        for (int n = 0; n < VECTORS; n++) at(o, d, n) = sum[d][n];
}

template <class Form, int ND>
void some_mix(int width, int keys, const float *p, const typename Form::Number *v, int64_t step, float *o) {
    if (width == ND) return mix<Form, ND>(keys, p, v, step, o);
    if constexpr (ND > 1) some_mix<Form, ND - 1>(width, keys, p, v, step, o);
}

template <class Form>
void mix_all(int keys, int64_t width, const float *p, const typename Form::Number *v, int64_t step, float *o) {
    for (int64_t d = 0; d < width; d += WIDTH)
        some_mix<Form, WIDTH>(int(width - d < WIDTH ? width - d : WIDTH), keys, p, Form::value(v, step, 0, d), step,
                              o + d * GROUP);
}

// Single precision: keys and values are read where they lie.
struct Singles {
    typedef float Number;
    static constexpr int IN_WORD = 1, PARTS = 1;
    static constexpr bool SCALES_QUERIES = true;

    // What all threads share, made before the first task.
    struct Shared {
        const int64_t pieces = 0;
        explicit Shared(const Arguments &) {}
        void pack(int64_t) {}
    };
    struct Setting {};  // of a thread, for as long as it computes

    const Number *k, *v;
    const int64_t head_dim, value_dim, k_step, v_step;

    Singles(const Arguments &a, const Shared &, int64_t batch, int64_t kv_head)
        : k((const Number *)a.k + batch * a.k_at.batch + kv_head * a.k_at.head),
          v((const Number *)a.v + batch * a.v_at.batch + kv_head * a.v_at.head),
          head_dim(a.head_dim), value_dim(a.value_dim), k_step(a.k_at.row), v_step(a.v_at.row) {}

    static float word(const Number *x) { return *x; }
    static float last_word(const Number *x) { return *x; }
    static Vec product(Vec sum, Vec x, float y) { return sum + x * y; }
    static const Number *value(const Number *v, int64_t step, int64_t j, int64_t d) { return v + j * step + d; }
    static void query(Vec x, float scale, Vec *parts) { parts[0] = x * scale; }
    static void store(Number *to, Vec x) { *(Loose *)to = x; }
    static Number number(float x) { return x; }

    void score(const float *q, int64_t key, int keys, float *s) const {
        all_scores<Singles>(keys, q, k + key * k_step, k_step, head_dim, s);
    }

    // Scores become e^(score - base), which `total` takes in.
    static float *weigh(float *s, int keys, float *, float, const Vec *base, Vec *total) {
        for (int j = 0; j < keys; j++)
            for (int n = 0; n < VECTORS; n++) total[n] += at(s, j, n) = exponential(at(s, j, n) - base[n]);
        return s;
    }

    void add_values(float *p, int64_t key, int keys, float *o) const {
        mix_all<Singles>(keys, value_dim, p, v + key * v_step, v_step, o);
    }
};

}  // namespace
