// Attention over the blocks that a pattern keeps, in single precision, for any CPU that the compiler knows.
//
// A task is one block of 64 queries of one head.  Its queries are taken in groups of two vectors: scores are kept transposed,
// one query a lane, so that keys and values are read where they lie and every reduction is a plain vector operation.
// Softmax is online over chunks of keys (Milakov and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ACCUMULATORS = 24;
#elif defined(__AVX__)
constexpr int LANES = 8, ACCUMULATORS = 12;
#else
constexpr int LANES = 4, ACCUMULATORS = 12;
#endif
constexpr int BLOCK = 64;   // queries and keys of one block of the layout
constexpr int CHUNK = 256;  // keys whose scores are held at a time
constexpr int GAP = 4;      // so many unseen keys between seen ones are computed along: cheaper than a new run
constexpr int VECTORS = 2, GROUP = VECTORS * LANES;
constexpr int KEYS = ACCUMULATORS / VECTORS, WIDTH = ACCUMULATORS / VECTORS;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4)));

struct Strides { int64_t batch, head, row, col; };  // in elements; 0 where an axis is broadcast

struct Arguments {
    const float *q, *k, *v, *bias, *sinks;
    const uint8_t *mask, *selected;
    const int32_t *q_segments, *kv_segments;  // [batches or 1, length]; none: all queries see all keys
    const uint8_t *pairs;                     // [heads or 1, query segment, key segment]; none: equal segments of at least 0
    const int32_t *moved;                     // [batches or 1, q_len]: as order, for every head; none: order
    float *out, *top, *log_sum;
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
    int32_t threads;
};

struct Piece { int keys; const uint64_t *bits; };        // keys of one block; no bits: all queries see all of them
struct Range { int32_t low, high; };                    // the segments of a block of keys
struct Run { int64_t key; int keys, first, last; };      // neighbouring keys, and their pieces

// The segments of a group of queries, which are mostly neighbours in one segment.
struct Segments {
    Int of_lane[VECTORS];
    int32_t low, high;  // the least and the greatest
    const uint8_t *pairs;
    Strides at;

    bool is_one() const { return low == high; }
    bool sees(int32_t query, int32_t key) const {
        return pairs ? pairs[query * at.row + key * at.col] != 0 : query == key && key >= 0;
    }
    // Whether some query may see a key of this segment, or of some between these.
    bool reach(int32_t key) const {
        if (is_one()) return sees(low, key);
        if (!pairs) return low <= key && key <= high && key >= 0;
        for (int n = 0; n < VECTORS; n++)
            for (int t = 0; t < LANES; t++)
                if (sees(of_lane[n][t], key)) return true;
        return false;
    }
    bool reach(int32_t first, int32_t last) const {
        return first == last ? reach(first) : pairs || (first <= high && last >= low);
    }
    Int seen(int n, int32_t key) const {
        if (!pairs) return key < 0 ? Int{} : of_lane[n] == Int{} + key;
        Int x;
        for (int t = 0; t < LANES; t++) x[t] = -int32_t(sees(of_lane[n][t], key));
        return x;
    }
};

struct Work {
    std::vector<float> space;
    std::vector<Run> runs;
    std::vector<Piece> pieces;
    float *q, *o, *s;

    explicit Work(const Arguments &a) {
        const int64_t wide = rounded(a.head_dim), deep = rounded(a.value_dim);
        space.resize((wide + deep + CHUNK) * GROUP + LANES);
        const uintptr_t size = LANES * sizeof(float);
        q = (float *)((uintptr_t(space.data()) + size - 1) / size * size);
        o = q + wide * GROUP;
        s = o + deep * GROUP;
    }
    static int64_t rounded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
};

inline Vec splat(float x) { return Vec{} + x; }
inline Vec greater(Vec a, Vec b) { return a > b ? a : b; }
inline Vec &at(float *p, int64_t j, int n) { return *(Vec *)(p + (j * VECTORS + n) * LANES); }
inline const Vec &at(const float *p, int64_t j, int n) { return *(const Vec *)(p + (j * VECTORS + n) * LANES); }

// exp with the reduction and the polynomial of Cephes' expf; exactly 0 for -inf, NaN for NaN.
inline Vec exponential(Vec x) {
    x = x < splat(-150.f) ? splat(-150.f) : x;
    x = x > splat(88.f) ? splat(88.f) : x;
    const Vec n = x * 1.44269504088896341f + 12582912.f - 12582912.f;
    const Vec f = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    const Int e = __builtin_convertvector(n, Int), half = e >> 1;  // two factors: 2^e alone may not be representable
    return p * (Vec)((half + 127) << 23) * (Vec)((e - half + 127) << 23);
}

// Cephes' tanhf: a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would lose digits.
inline Vec hyperbolic_tangent(Vec x) {
    const Vec z = x * x;
    Vec p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    p = p * z * x + x;
    const Vec size = x < splat(0.f) ? -x : x;
    const Vec far = 1.f - 2.f / (exponential(2.f * size) + 1.f);
    return size < splat(0.625f) ? p : x < splat(0.f) ? -far : far;
}

template <int STEP> inline void exchange(Vec *v) {
    Int low, high;
    for (int t = 0; t < LANES; t++) {
        low[t] = t & STEP ? LANES + t - STEP : t;
        high[t] = t & STEP ? LANES + t : t + STEP;
    }
    for (int i = 0; i < LANES; i++) {
        if (i & STEP) continue;
        const Vec a = v[i], b = v[i + STEP];
#if defined(__clang__)
        for (int t = 0; t < LANES; t++) {
            v[i][t] = low[t] < LANES ? a[low[t]] : b[low[t] - LANES];
            v[i + STEP][t] = high[t] < LANES ? a[high[t]] : b[high[t] - LANES];
        }
#else
        v[i] = __builtin_shuffle(a, b, low);
        v[i + STEP] = __builtin_shuffle(a, b, high);
#endif
    }
}

inline void transpose(Vec *v) {
    exchange<1>(v);
    exchange<2>(v);
    if constexpr (LANES > 4) exchange<4>(v);
    if constexpr (LANES > 8) exchange<8>(v);
}

template <int NK> inline void scores(const float *q, const float *k, int64_t step, int64_t head_dim, float *s) {
    Vec sum[NK][VECTORS] = {};
    for (int64_t d = 0; d < head_dim; d++)
        for (int j = 0; j < NK; j++)
            for (int n = 0; n < VECTORS; n++) sum[j][n] += at(q, d, n) * k[j * step + d];
    for (int j = 0; j < NK; j++)
        for (int n = 0; n < VECTORS; n++) at(s, j, n) = sum[j][n];
}

template <int NK> void some_scores(int keys, const float *q, const float *k, int64_t step, int64_t head_dim, float *s) {
    if (keys == NK) return scores<NK>(q, k, step, head_dim, s);
    if constexpr (NK > 1) some_scores<NK - 1>(keys, q, k, step, head_dim, s);
}

template <int ND> inline void mix(int keys, const float *p, const float *v, int64_t step, float *o) {
    Vec sum[ND][VECTORS];
    for (int d = 0; d < ND; d++)
        for (int n = 0; n < VECTORS; n++) sum[d][n] = at(o, d, n);
    for (int j = 0; j < keys; j++)
        for (int d = 0; d < ND; d++)
            for (int n = 0; n < VECTORS; n++) sum[d][n] += at(p, j, n) * v[j * step + d];
    for (int d = 0; d < ND; d++)
        for (int n = 0; n < VECTORS; n++) at(o, d, n) = sum[d][n];
}

template <int ND> void some_mix(int width, int keys, const float *p, const float *v, int64_t step, float *o) {
    if (width == ND) return mix<ND>(keys, p, v, step, o);
    if constexpr (ND > 1) some_mix<ND - 1>(width, keys, p, v, step, o);
}

// One attention of `count` queries from `row` on, of one head, over the keys in `work.runs`.
struct Group {
    const Arguments &a;
    Work &work;
    const int64_t batch, head;
    const int32_t *order;    // the queries
    const int count, shift;  // shift: the place of the first one within its block
    Segments segments;

    const int32_t *key_segments() const { return a.kv_segments + batch * a.kv_segments_at.batch; }

    // The segments of the queries, if there are any.
    void read_segments() {
        if (!a.q_segments) return;
        segments.pairs = a.pairs ? a.pairs + head * a.pairs_at.head : nullptr;
        segments.at = a.pairs_at;
        const int32_t *own = a.q_segments + batch * a.q_segments_at.batch;
        segments.low = segments.high = own[query(0)];
        for (int n = 0; n < VECTORS; n++)
            for (int t = 0; t < LANES; t++) {
                const int32_t id = own[query(n * LANES + t)];
                segments.of_lane[n][t] = id;
                segments.low = std::min(segments.low, id);
                segments.high = std::max(segments.high, id);
            }
    }

    int64_t query(int r) const { return order[std::min(r, count - 1)]; }  // lanes without one repeat the last

    // The element of an operand at this batch and head, for the r-th query.
    template <class T> T *element(T *start, const Strides &s, int r) const {
        return start + batch * s.batch + head * s.head + query(r) * s.row;
    }

    void load_queries() const {
        for (int n = 0; n < VECTORS; n++)
            for (int64_t d = 0; d < a.head_dim; d += LANES) {
                Vec t[LANES] = {};
                const int width = int(std::min<int64_t>(LANES, a.head_dim - d));
                for (int r = 0; r < LANES; r++) {
                    const float *from = element(a.q, a.q_at, n * LANES + r) + d;
                    if (width == LANES) t[r] = *(const Loose *)from;
                    else for (int e = 0; e < width; e++) t[r][e] = from[e];
                }
                transpose(t);
                for (int e = 0; e < LANES; e++) at(work.q, d + e, n) = t[e] * a.scale;
            }
    }

    void store(const Vec *top, const Vec *total) const {
        for (int n = 0; n < VECTORS; n++) {
            for (int r = 0; r < LANES && n * LANES + r < count; r++) {
                *element(a.top, a.row_at, n * LANES + r) = top[n][r];
                *element(a.log_sum, a.row_at, n * LANES + r) = total[n][r] == 0.f ? 0.f : std::log(total[n][r]);
            }
            const Vec inverse = total[n] == Vec{} ? Vec{} : 1.f / total[n];
            for (int64_t d = 0; d < a.value_dim; d += LANES) {
                Vec t[LANES];
                const int width = int(std::min<int64_t>(LANES, a.value_dim - d));
                for (int e = 0; e < LANES; e++) t[e] = at(work.o, d + e, n) * inverse;
                transpose(t);
                for (int r = 0; r < LANES && n * LANES + r < count; r++) {
                    float *out = element(a.out, a.out_at, n * LANES + r) + d;
                    if (width == LANES) *(Loose *)out = t[r];
                    else for (int e = 0; e < width; e++) out[e] = t[r][e];
                }
            }
        }
    }

    void cap(float *s, int keys) const {
        const float inverse = 1.f / a.softcap;
        for (int j = 0; j < keys; j++)
            for (int n = 0; n < VECTORS; n++) at(s, j, n) = a.softcap * hyperbolic_tangent(at(s, j, n) * inverse);
    }

    // What an operand holds for the n-th vector of queries and key j.
    template <class T> Vec column(T *start, const Strides &from, int n, int j) const {
        Vec x;
        for (int t = 0; t < LANES; t++) x[t] = float(element(start, from, n * LANES + t)[j * from.col]);
        return x;
    }

    void add_bias(float *s, int64_t key, int keys) const {
        const Strides &from = a.bias_at;
        const float *start = a.bias + key * from.col;
        if (!from.row) {
            const float *p = element(start, from, 0);
            for (int j = 0; j < keys; j++)
                for (int n = 0; n < VECTORS; n++) at(s, j, n) += p[j * from.col];
            return;
        }
        for (int n = 0; n < VECTORS; n++) {
            int j = 0;
            for (; from.col == 1 && j + LANES <= keys; j += LANES) {
                Vec t[LANES];
                for (int r = 0; r < LANES; r++) t[r] = *(const Loose *)(element(start, from, n * LANES + r) + j);
                transpose(t);
                for (int e = 0; e < LANES; e++) at(s, j + e, n) += t[e];
            }
            for (; j < keys; j++) at(s, j, n) += column(start, from, n, j);
        }
    }

    void hide_masked(float *s, int64_t key, int keys) const {
        const Strides &from = a.mask_at;
        const uint8_t *start = a.mask + key * from.col;
        for (int j = 0; j < keys; j++) {
            if (!from.row) {
                if (!element(start, from, 0)[j * from.col])
                    for (int n = 0; n < VECTORS; n++) at(s, j, n) = splat(-INFINITY);
                continue;
            }
            for (int n = 0; n < VECTORS; n++) {
                at(s, j, n) = column(start, from, n, j) != 0.f ? at(s, j, n) : splat(-INFINITY);
            }
        }
    }

    void hide_unseen(float *s, const Run &run) const {
        Int bit;
        for (int t = 0; t < LANES; t++) bit[t] = int32_t(1u << t);
        for (int p = run.first; p < run.last; s += work.pieces[p++].keys * GROUP) {
            const Piece &piece = work.pieces[p];
            if (!piece.bits) continue;
            for (int j = 0; j < piece.keys; j++)
                for (int n = 0; n < VECTORS; n++) {
                    const Int word = Int{} + int32_t(piece.bits[j] >> (shift + n * LANES));
                    at(s, j, n) = (word & bit) != 0 ? at(s, j, n) : splat(-INFINITY);
                }
        }
    }

    void hide_other_segments(float *s, int64_t key, int keys) const {
        const int32_t *of_key = key_segments() + key;
        for (int j = 0; j < keys; j++) {
            if (segments.is_one() && segments.sees(segments.low, of_key[j])) continue;
            for (int n = 0; n < VECTORS; n++)
                at(s, j, n) = segments.seen(n, of_key[j]) != 0 ? at(s, j, n) : splat(-INFINITY);
        }
    }

    void score(float *s, const Run &run) const {
        const int64_t step = a.k_at.row;
        const float *k = a.k + batch * a.k_at.batch + a.kv_of_head[head] * a.k_at.head + run.key * step;
        for (int j = 0; j < run.keys; j += KEYS)
            some_scores<KEYS>(std::min(KEYS, run.keys - j), work.q, k + j * step, step, a.head_dim, s + j * GROUP);
        if (a.softcap != 0.f) cap(s, run.keys);
        if (a.bias) add_bias(s, run.key, run.keys);
        if (a.mask) hide_masked(s, run.key, run.keys);
        if (a.q_segments) hide_other_segments(s, run.key, run.keys);
        hide_unseen(s, run);
    }

    void attend() const {
        load_queries();
        std::memset(work.o, 0, sizeof(float) * Work::rounded(a.value_dim) * GROUP);
        Vec top[VECTORS], total[VECTORS];
        for (int n = 0; n < VECTORS; n++) {
            top[n] = splat(-INFINITY);
            if (a.sinks) top[n] = column(a.sinks, a.sinks_at, n, 0);
            total[n] = top[n] == splat(-INFINITY) ? Vec{} : splat(1.f);
        }
        for (size_t next = 0; next < work.runs.size();) next = chunk(next, top, total);
        store(top, total);
    }

    // Takes in as many runs as there is room for; returns the first that is left.
    size_t chunk(size_t first, Vec *top, Vec *total) const {
        size_t end = first;
        int used = 0;
        for (; end < work.runs.size() && used + work.runs[end].keys <= CHUNK; used += work.runs[end++].keys)
            score(work.s + used * GROUP, work.runs[end]);
        Vec high[VECTORS], base[VECTORS];
        for (int n = 0; n < VECTORS; n++) high[n] = top[n];
        for (int j = 0; j < used; j++)
            for (int n = 0; n < VECTORS; n++) high[n] = greater(at(work.s, j, n), high[n]);
        for (int n = 0; n < VECTORS; n++) {
            base[n] = high[n] == splat(-INFINITY) ? Vec{} : high[n];  // nothing seen yet: every exponential is 0
            const Vec kept = exponential(top[n] - base[n]);
            top[n] = high[n];
            total[n] *= kept;
            if (first)
                for (int64_t d = 0; d < a.value_dim; d++) at(work.o, d, n) *= kept;
        }
        for (int j = 0; j < used; j++)
            for (int n = 0; n < VECTORS; n++) total[n] += at(work.s, j, n) = exponential(at(work.s, j, n) - base[n]);
        const int64_t step = a.v_at.row;
        const float *v = a.v + batch * a.v_at.batch + a.kv_of_head[head] * a.v_at.head;
        const float *p = work.s;
        for (size_t r = first; r < end; p += work.runs[r++].keys * GROUP)
            for (int64_t d = 0; d < a.value_dim; d += WIDTH)
                some_mix<WIDTH>(int(std::min<int64_t>(WIDTH, a.value_dim - d)), work.runs[r].keys, p,
                                v + work.runs[r].key * step + d, step, work.o + d * GROUP);
        return end;
    }
};

// Adds keys to the last run, or begins a new one.
void add(Work &work, int64_t key, int keys, const uint64_t *bits) {
    const int place = int(work.pieces.size());
    work.pieces.push_back({keys, bits});
    if (!work.runs.empty()) {
        Run &last = work.runs.back();
        if (last.key + last.keys == key && last.keys + keys <= CHUNK) {
            last.keys += keys;
            last.last++;
            return;
        }
    }
    work.runs.push_back({key, keys, place, place + 1});
}

// The keys that a group of queries sees, as runs of neighbours.
void gather(const Group &g, const int64_t *row, const uint8_t *selected, const Range *of_blocks) {
    const Arguments &a = g.a;
    Work &work = g.work;
    work.runs.clear();
    work.pieces.clear();
    const uint64_t these = ((1ull << GROUP) - 1) << g.shift;
    const int32_t *of_key = a.q_segments ? g.key_segments() : nullptr;
    int32_t last = INT32_MIN;  // neighbours are mostly of one segment
    bool reached = true;
    for (int64_t e = row[0]; e < row[1]; e++) {
        if (selected && !selected[a.cols[e] * a.selected_at.col]) continue;
        const int64_t key = int64_t(a.cols[e]) * BLOCK;
        const int keys = int(std::min<int64_t>(BLOCK, a.kv_len - key));
        const uint64_t *bits = a.tile[e] < 0 ? nullptr : a.tiles + int64_t(a.tile[e]) * BLOCK;
        const Range *range = of_key ? of_blocks + a.cols[e] : nullptr;
        if (range && !g.segments.reach(range->low, range->high)) continue;
        if (!bits && (!range || range->low == range->high)) {
            add(work, key, keys, nullptr);
            continue;
        }
        const auto is_seen = [&](int j) {
            if (bits && !(bits[j] & these)) return false;
            if (of_key && of_key[key + j] != last) reached = g.segments.reach(last = of_key[key + j]);
            return reached;
        };
        for (int j = 0, end; j < keys; j = end) {
            if (!is_seen(j)) {
                end = j + 1;
                continue;
            }
            int seen = j;  // the last key so far that some query sees
            for (end = j + 1; end < keys && end - seen <= GAP; end++)
                if (is_seen(end)) seen = end;
            add(work, key + j, seen + 1 - j, bits ? bits + j : nullptr);
        }
    }
}

// Of each block of keys, [batches or 1, blocks].
std::vector<Range> ranges(const Arguments &a) {
    std::vector<Range> found;
    if (!a.kv_segments) return found;
    for (int64_t b = 0; b < (a.kv_segments_at.batch ? a.batches : 1); b++)
        for (int64_t key = 0; key < a.kv_len; key += BLOCK) {
            const int32_t *first = a.kv_segments + b * a.kv_segments_at.batch + key;
            const auto ends = std::minmax_element(first, first + std::min<int64_t>(BLOCK, a.kv_len - key));
            found.push_back({*ends.first, *ends.second});
        }
    return found;
}

}  // namespace

extern "C" void attnopt_attend(const Arguments *arguments) {
    const Arguments &a = *arguments;
    const int64_t rows = (a.q_len + BLOCK - 1) / BLOCK, tasks = a.batches * a.heads * rows;
    const std::vector<Range> of_blocks = ranges(a);
    const int64_t blocks = (a.kv_len + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && tasks > 1)
    {
        Work work(a);
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tasks; t++) {
            const int64_t r = t % rows, head = t / rows % a.heads, batch = t / rows / a.heads;
            const int64_t *row = a.row_ptr + a.layout_of_head[head] * (rows + 1) + r;
            const int32_t *order = a.order + a.layout_of_head[head] * a.q_len + r * BLOCK;
            if (a.moved) order = a.moved + batch * a.moved_at.batch + r * BLOCK;
            const Range *ranges = of_blocks.data() + (a.kv_segments_at.batch ? batch * blocks : 0);
            const Strides &s = a.selected_at;
            const uint8_t *selected = a.selected ? a.selected + batch * s.batch + head * s.head + r * s.row : nullptr;
            const int count = int(std::min<int64_t>(BLOCK, a.q_len - r * BLOCK));
            for (int shift = 0; shift < count; shift += GROUP) {
                Group group{a, work, batch, head, order + shift, std::min(GROUP, count - shift), shift, {}};
                group.read_segments();
                gather(group, row, selected, ranges);
                group.attend();
            }
        }
    }
}
