// What a call of the kernel is given, and the two products of an attention.
//
// A form says in which precision they are computed.  Queries and probabilities are transposed, one query a lane; a lane holds
// a word, of one number or of two neighbours that one instruction multiplies.  A number may be the sum of several parts.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

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

// The first of the fewest parts of at most `most` that are about equal: few sums at a time would wait for each other.
inline int part_of(int64_t count, int most) {
    const int64_t parts = (count + most - 1) / most;
    return int((count + parts - 1) / parts);
}

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
    for (int j = 0, n; j < keys; j += n) {
        n = part_of(keys - j, KEYS);
        some_scores<Form, KEYS>(n, q, k + j * step, step, words, s + j * GROUP);
    }
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
    for (int64_t d = 0, n; d < width; d += n) {
        n = part_of(width - d, WIDTH);
        some_mix<Form, WIDTH>(int(n), keys, p, Form::value(v, step, 0, d), step, o + d * GROUP);
    }
}

// Keys or values of one head.  Rows that lie apart are copied, a block at its first use: those of a model's many heads are at
// distances that fill a few sets of a cache and leave the others empty.
struct Rows {
    static constexpr int64_t MOST = 1 << 22;  // numbers that a thread copies
    const float *start = nullptr, *rows = nullptr;
    int64_t apart = 0, step = 0, width = 0, count = 0;
    std::unique_ptr<float[]> copy;
    std::vector<uint8_t> is_copied;  // of each block; empty: rows are read where they lie

    void are(const float *from, int64_t distance, int64_t size, int64_t number, bool copies) {
        if (from == start) return;
        start = rows = from;
        apart = step = distance;
        width = size, count = number;
        if (!copies || distance == size || number * size > MOST) return;
        if (!copy) copy.reset(new float[number * size]);
        is_copied.assign((number + BLOCK - 1) / BLOCK, false);
        rows = copy.get();
        step = size;
    }

    const float *at(int64_t first, int keys) {
        if (!is_copied.empty())
            for (int64_t block = first / BLOCK; block * BLOCK < first + keys; block++)
                if (!is_copied[block]) take(block);
        return rows + first * step;
    }

    void take(int64_t block) {
        for (int64_t key = block * BLOCK; key < std::min<int64_t>(count, (block + 1) * BLOCK); key++)
            std::memcpy(copy.get() + key * width, start + key * apart, width * sizeof(float));
        is_copied[block] = true;
    }
};

// Single precision.
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
    // Of a thread, for as long as it computes.
    struct Setting {
        Rows keys, values;
    };

    Rows &keys, &values;

    Singles(const Arguments &a, const Shared &, Setting &own, int64_t batch, int64_t kv_head)
        : keys(own.keys), values(own.values) {
        const bool copies = a.q_len > GROUP;  // each row is read several times
        const auto of_head = [&](const void *start, const Strides &at) {
            return (const Number *)start + batch * at.batch + kv_head * at.head;
        };
        keys.are(of_head(a.k, a.k_at), a.k_at.row, a.head_dim, a.kv_len, copies);
        values.are(of_head(a.v, a.v_at), a.v_at.row, a.value_dim, a.kv_len, copies);
    }

    static float word(const Number *x) { return *x; }
    static float last_word(const Number *x) { return *x; }
    static Vec product(Vec sum, Vec x, float y) { return sum + x * y; }
    static const Number *value(const Number *v, int64_t step, int64_t j, int64_t d) { return v + j * step + d; }
    static void query(Vec x, float scale, Vec *parts) { parts[0] = x * scale; }
    static void store(Number *to, Vec x) { *(Loose *)to = x; }
    static Number number(float x) { return x; }

    void score(const float *q, int64_t key, int count, float *s) const {
        all_scores<Singles>(count, q, keys.at(key, count), keys.step, keys.width, s);
    }

    // Scores become e^(score - base), which `total` takes in.
    static float *weigh(float *s, int keys, float *, float, const Vec *base, Vec *total) {
        for (int j = 0; j < keys; j++)
            for (int n = 0; n < VECTORS; n++) total[n] += at(s, j, n) = exponential(at(s, j, n) - base[n]);
        return s;
    }

    void add_values(float *p, int64_t key, int count, float *o) const {
        mix_all<Singles>(count, values.width, p, values.at(key, count), values.step, o);
    }
};

}  // namespace
