// Attention over the blocks that a pattern keeps, for any CPU that the compiler knows: in single precision,
// and in bfloat16 where the CPU multiplies it.
//
// A task is one block of 64 queries of one head.  Its queries are taken in groups of two vectors: scores are kept transposed,
// one query a lane, so that keys and values need not be transposed and every reduction is a plain vector operation.
// Softmax is online over chunks of keys (Milakov and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attend_pairs.h"
#include "attend_products.h"

namespace {

constexpr int GAP = 4;     // so many unseen keys between seen ones are computed along: cheaper than a new run

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
    float *q, *o, *s, *p;  // queries, sums of values, scores, probabilities where these are not of the form of scores

    Work(int64_t words, int parts, int64_t value_dim) {
        const int64_t wide = rounded(words, LANES) * parts, deep = rounded(value_dim, LANES);
        space.resize((wide + deep + CHUNK + TILE + parts * PAIR_ROWS) * GROUP + LANES);
        const uintptr_t size = LANES * sizeof(float);
        q = (float *)((uintptr_t(space.data()) + size - 1) / size * size);
        o = q + wide * GROUP;
        s = o + deep * GROUP;
        p = s + (CHUNK + TILE) * GROUP;
    }
};

// One attention of `count` queries from `row` on, of one head, over the keys in `work.runs`.
template <class Form> struct Group {
    typedef typename Form::Number Number;
    const Arguments &a;
    Work &work;
    const Form form;
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
        const int64_t size = rounded((a.head_dim + Form::IN_WORD - 1) / Form::IN_WORD, LANES);
        for (int n = 0; n < VECTORS; n++)
            for (int64_t d = 0; d < a.head_dim; d += LANES * Form::IN_WORD) {
                Vec t[LANES] = {};
                const size_t bytes = std::min<size_t>(sizeof(Vec), (a.head_dim - d) * sizeof(Number));
                for (int r = 0; r < LANES; r++) {
                    const Number *from = element((const Number *)a.q, a.q_at, n * LANES + r) + d;
                    if (bytes == sizeof(Vec)) t[r] = *(const Loose *)from;
                    else std::memcpy(&t[r], from, bytes);
                }
                transpose(t);
                for (int e = 0; e < LANES; e++) {
                    Vec parts[Form::PARTS];
                    Form::query(t[e], a.scale, parts);
                    for (int i = 0; i < Form::PARTS; i++) at(work.q, i * size + d / Form::IN_WORD + e, n) = parts[i];
                }
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
                    Number *out = element((Number *)a.out, a.out_at, n * LANES + r) + d;
                    if (width == LANES) Form::store(out, t[r]);
                    else for (int e = 0; e < width; e++) out[e] = Form::number(t[r][e]);
                }
            }
        }
    }

    // Whether scores are compared before they are scaled: nothing else is added to them, and 0 hides nothing.
    bool scales_late() const { return !Form::SCALES_QUERIES && a.softcap == 0.f && !a.bias && a.scale != 0.f; }

    void scale(float *s, int keys) const {
        for (int j = 0; j < keys; j++)
            for (int n = 0; n < VECTORS; n++) at(s, j, n) *= std::fabs(a.scale);
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
        form.score(work.q, run.key, run.keys, s);
        if (!Form::SCALES_QUERIES && !scales_late()) scale(s, run.keys);
        if (a.softcap != 0.f) cap(s, run.keys);
        if (a.bias) add_bias(s, run.key, run.keys);
        if (a.mask) hide_masked(s, run.key, run.keys);
        if (a.q_segments) hide_other_segments(s, run.key, run.keys);
        hide_unseen(s, run);
    }

    void attend() const {
        load_queries();
        std::memset(work.o, 0, sizeof(float) * rounded(a.value_dim, LANES) * GROUP);
        Vec top[VECTORS], total[VECTORS];
        for (int n = 0; n < VECTORS; n++) {
            top[n] = splat(-INFINITY);
            if (a.sinks) top[n] = column(a.sinks, a.sinks_at, n, 0);
            total[n] = top[n] == splat(-INFINITY) ? Vec{} : splat(1.f);
        }
        for (size_t next = 0; next < work.runs.size();) next = chunk(next, top, total);
        store(top, total);
    }

    // Of the scores of each query; several at a time, since one maximum waits for the last.
    void greatest(int keys, Vec *high) const {
        constexpr int WAYS = 4;
        Vec of[WAYS][VECTORS];
        for (int w = 0; w < WAYS; w++)
            for (int n = 0; n < VECTORS; n++) of[w][n] = splat(-INFINITY);
        int j = 0;
        for (; j + WAYS <= keys; j += WAYS)
            for (int w = 0; w < WAYS; w++)
                for (int n = 0; n < VECTORS; n++) of[w][n] = greater(at(work.s, j + w, n), of[w][n]);
        for (; j < keys; j++)
            for (int n = 0; n < VECTORS; n++) of[0][n] = greater(at(work.s, j, n), of[0][n]);
        for (int n = 0; n < VECTORS; n++) high[n] = greater(greater(of[0][n], of[1][n]), greater(of[2][n], of[3][n]));
    }

    // Takes in as many runs as there is room for; returns the first that is left.
    size_t chunk(size_t first, Vec *top, Vec *total) const {
        size_t end = first;
        int used = 0;
        for (; end < work.runs.size() && used + work.runs[end].keys <= CHUNK; used += work.runs[end++].keys)
            score(work.s + used * GROUP, work.runs[end]);
        const float factor = scales_late() ? std::fabs(a.scale) : 1.f;
        Vec high[VECTORS], base[VECTORS];
        greatest(used, high);
        for (int n = 0; n < VECTORS; n++) {
            high[n] = greater(high[n] * factor, top[n]);
            base[n] = high[n] == splat(-INFINITY) ? Vec{} : high[n];  // nothing seen yet: every exponential is 0
            const Vec kept = exponential(top[n] - base[n]);
            top[n] = high[n];
            total[n] *= kept;
            if (first)
                for (int64_t d = 0; d < a.value_dim; d++) at(work.o, d, n) *= kept;
        }
        float *s = work.s;
        for (size_t r = first; r < end; s += work.runs[r++].keys * GROUP) {
            const Run &run = work.runs[r];
            form.add_values(Form::weigh(s, run.keys, work.p, factor, base, total), run.key, run.keys, work.o);
        }
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
template <class Form> void gather(const Group<Form> &g, const int64_t *row, const uint8_t *selected, const Range *of_blocks) {
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

template <class Form> void attend(const Arguments &a) {
    const int64_t rows = (a.q_len + BLOCK - 1) / BLOCK, tasks = a.batches * a.heads * rows;
    const std::vector<Range> of_blocks = ranges(a);
    const int64_t blocks = (a.kv_len + BLOCK - 1) / BLOCK;
    typename Form::Shared shared(a);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && tasks > 1)
    {
        Work work((a.head_dim + Form::IN_WORD - 1) / Form::IN_WORD, Form::PARTS, a.value_dim);
        typename Form::Setting setting;
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < shared.pieces; piece++) shared.pack(piece);
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
            const Form form(a, shared, setting, batch, a.kv_of_head[head]);
            for (int shift = 0; shift < count; shift += GROUP) {
                Group<Form> group{a, work, form, batch, head, order + shift, std::min(GROUP, count - shift), shift, {}};
                group.read_segments();
                gather(group, row, selected, ranges);
                group.attend();
            }
        }
    }
}

enum { SINGLES, PAIRS, TILES };

}  // namespace

// The best form of half precision for this process; it can compute those before it, too.  float16 needs tiles.
extern "C" int32_t attnopt_best_form() {
#ifdef HAS_TILES
    if (tiles_are_lent()) return TILES;
#endif
#ifdef HAS_PAIRS
    return PAIRS;
#else
    return SINGLES;
#endif
}

// The one to use where none is asked for.  Intel adds two products in twice the time of one: without tiles, that gains nothing.
extern "C" int32_t attnopt_own_form() {
    const int32_t best = attnopt_best_form();
#if defined(HAS_PAIRS) && defined(__x86_64__)
    if (best == PAIRS && !__builtin_cpu_is("amd")) return SINGLES;
#endif
    return best;
}

extern "C" void attnopt_attend(const Arguments *a) {
#ifdef HAS_TILES
    if (a->form == TILES) return a->is_float16 ? attend<Tiles<Float16>>(*a) : attend<Tiles<Bfloat16>>(*a);
#endif
#ifdef HAS_PAIRS
    if (a->form == PAIRS) return attend<Pairs<Bfloat16>>(*a);
#endif
    attend<Singles>(*a);
}
