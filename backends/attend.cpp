// Attention over the blocks that a pattern keeps, for any CPU that the compiler knows: in single precision,
// and in bfloat16 where the CPU multiplies it.
//
// A task is a few blocks of 64 queries of one head.  Its queries are taken in groups of two vectors: scores are kept transposed,
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

// Of one group of queries: what it sees, and its softmax so far.
struct State {
    std::vector<Run> runs;
    std::vector<Piece> pieces;
    size_t next;  // the first run that is not taken in
    float *q, *o;  // queries, sums of values
    Vec top[VECTORS], total[VECTORS];
};

// Of a thread.
struct Work {
    std::vector<float> space;
    std::vector<State> states;
    float *s, *p;  // scores, probabilities where these are not of the form of scores

    Work(int64_t words, int parts, int64_t value_dim, int64_t groups) : states(groups) {
        const int64_t wide = rounded(words, LANES) * parts, deep = rounded(value_dim, LANES);
        space.resize((groups * (wide + deep) + CHUNK + TILE + parts * PAIR_ROWS) * GROUP + LANES);
        const uintptr_t size = LANES * sizeof(float);
        s = (float *)((uintptr_t(space.data()) + size - 1) / size * size);
        p = s + (CHUNK + TILE) * GROUP;
        float *free = p + parts * PAIR_ROWS * GROUP;
        for (State &state : states) {
            state.q = free;
            state.o = free += wide * GROUP;
            free += deep * GROUP;
        }
    }
};

// One attention of `count` queries from `row` on, of one head, over the keys in `state.runs`.
template <class Form> struct Group {
    typedef typename Form::Number Number;
    const Arguments &a;
    Work &work;
    State &state;
    const Form &form;
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
                    for (int i = 0; i < Form::PARTS; i++) at(state.q, i * size + d / Form::IN_WORD + e, n) = parts[i];
                }
            }
    }

    void end() const {
        const Vec *top = state.top, *total = state.total;
        for (int n = 0; n < VECTORS; n++) {
            for (int r = 0; r < LANES && n * LANES + r < count; r++) {
                *element(a.top, a.row_at, n * LANES + r) = top[n][r];
                *element(a.log_sum, a.row_at, n * LANES + r) = total[n][r] == 0.f ? 0.f : std::log(total[n][r]);
            }
            const Vec inverse = total[n] == Vec{} ? Vec{} : 1.f / total[n];
            for (int64_t d = 0; d < a.value_dim; d += LANES) {
                Vec t[LANES];
                const int width = int(std::min<int64_t>(LANES, a.value_dim - d));
                for (int e = 0; e < LANES; e++) t[e] = at(state.o, d + e, n) * inverse;
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
        for (int p = run.first; p < run.last; s += state.pieces[p++].keys * GROUP) {
            const Piece &piece = state.pieces[p];
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
        form.score(state.q, run.key, run.keys, s);
        if (!Form::SCALES_QUERIES && !scales_late()) scale(s, run.keys);
        if (a.softcap != 0.f) cap(s, run.keys);
        if (a.bias) add_bias(s, run.key, run.keys);
        if (a.mask) hide_masked(s, run.key, run.keys);
        if (a.q_segments) hide_other_segments(s, run.key, run.keys);
        hide_unseen(s, run);
    }

    void begin() const {
        load_queries();
        std::memset(state.o, 0, sizeof(float) * rounded(a.value_dim, LANES) * GROUP);
        for (int n = 0; n < VECTORS; n++) {
            state.top[n] = splat(-INFINITY);
            if (a.sinks) state.top[n] = column(a.sinks, a.sinks_at, n, 0);
            state.total[n] = state.top[n] == splat(-INFINITY) ? Vec{} : splat(1.f);
        }
        state.next = 0;
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

    // Takes in as many runs as there is room for.  Whether some are left.
    bool chunk() const {
        if (state.next == state.runs.size()) return false;
        const size_t first = state.next;
        size_t end = first;
        int used = 0;
        for (; end < state.runs.size() && used + state.runs[end].keys <= CHUNK; used += state.runs[end++].keys)
            score(work.s + used * GROUP, state.runs[end]);
        const float factor = scales_late() ? std::fabs(a.scale) : 1.f;
        Vec high[VECTORS], base[VECTORS], total[VECTORS];
        greatest(used, high);
        for (int n = 0; n < VECTORS; n++) {
            const Vec top = greater(high[n] * factor, state.top[n]);
            base[n] = top == splat(-INFINITY) ? Vec{} : top;  // nothing seen yet: every exponential is 0
            const Vec kept = exponential(state.top[n] - base[n]);
            state.top[n] = top;
            total[n] = state.total[n] * kept;
            if (first && any(kept != splat(1.f)))
                for (int64_t d = 0; d < a.value_dim; d++) at(state.o, d, n) *= kept;
        }
        float *s = work.s;
        for (size_t r = first; r < end; s += state.runs[r++].keys * GROUP) {
            const Run &run = state.runs[r];
            form.add_values(Form::weigh(s, run.keys, work.p, factor, base, total), run.key, run.keys, state.o);
        }
        for (int n = 0; n < VECTORS; n++) state.total[n] = total[n];
        state.next = end;
        return end < state.runs.size();
    }
};

// Adds keys to the last run, or begins a new one.
void add(State &state, int64_t key, int keys, const uint64_t *bits) {
    const int place = int(state.pieces.size());
    state.pieces.push_back({keys, bits});
    if (!state.runs.empty()) {
        Run &last = state.runs.back();
        if (last.key + last.keys == key && last.keys + keys <= CHUNK) {
            last.keys += keys;
            last.last++;
            return;
        }
    }
    state.runs.push_back({key, keys, place, place + 1});
}

// The keys that a group of queries sees, as runs of neighbours.
template <class Form> void gather(const Group<Form> &g, const int64_t *row, const uint8_t *selected, const Range *of_blocks) {
    const Arguments &a = g.a;
    State &state = g.state;
    state.runs.clear();
    state.pieces.clear();
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
            add(state, key, keys, nullptr);
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
            add(state, key + j, seen + 1 - j, bits ? bits + j : nullptr);
        }
    }
}

template <class Form> void attend_in_step(std::vector<Group<Form>> &groups) {
    for (const Group<Form> &group : groups) group.begin();
    for (bool is_left = true; is_left;) {
        is_left = false;
        for (const Group<Form> &group : groups) is_left |= group.chunk();
    }
    for (const Group<Form> &group : groups) group.end();
    groups.clear();
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

// How many rows of blocks one task takes.  Where a row reads more keys and values than a cache holds, the groups of several
// rows take them in step, so that each comes from memory once; where it does not, going from group to group costs more.
template <class Form> int64_t rows_of_task(const Arguments &a, int64_t rows) {
    constexpr int64_t MOST = 4, CACHE = 1 << 20;
    const int64_t layouts = *std::max_element(a.layout_of_head, a.layout_of_head + a.heads) + 1;
    const int64_t blocks = (a.row_ptr[layouts * (rows + 1) - 1] - a.row_ptr[0]) / (layouts * rows);
    const int64_t bytes = blocks * BLOCK * (a.head_dim + a.value_dim) * Form::PARTS * int64_t(sizeof(typename Form::Number));
    if (bytes < CACHE) return 1;
    return std::clamp<int64_t>(a.batches * a.heads * rows / (4 * a.threads), 1, std::min(MOST, rows));
}

template <class Form> void attend(const Arguments &a) {
    const int64_t rows = (a.q_len + BLOCK - 1) / BLOCK, of_task = rows_of_task<Form>(a, rows);
    const int64_t of_head = (rows + of_task - 1) / of_task, tasks = a.batches * a.heads * of_head;
    const std::vector<Range> of_blocks = ranges(a);
    const int64_t blocks = (a.kv_len + BLOCK - 1) / BLOCK;
    typename Form::Shared shared(a);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1 && tasks > 1)
    {
        const int64_t words = (a.head_dim + Form::IN_WORD - 1) / Form::IN_WORD;
        Work work(words, Form::PARTS, a.value_dim, of_task == 1 ? 1 : of_task * BLOCK / GROUP);
        typename Form::Setting setting;
        std::vector<Group<Form>> groups;
        groups.reserve(work.states.size());
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < shared.pieces; piece++) shared.pack(piece);
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tasks; t++) {
            const int64_t first = t % of_head * of_task, head = t / of_head % a.heads, batch = t / of_head / a.heads;
            const Range *ranges = of_blocks.data() + (a.kv_segments_at.batch ? batch * blocks : 0);
            const Form form(a, shared, setting, batch, a.kv_of_head[head]);
            for (int64_t r = first; r < std::min(first + of_task, rows); r++) {
                const int64_t *row = a.row_ptr + a.layout_of_head[head] * (rows + 1) + r;
                const int32_t *order = a.order + a.layout_of_head[head] * a.q_len + r * BLOCK;
                if (a.moved) order = a.moved + batch * a.moved_at.batch + r * BLOCK;
                const Strides &s = a.selected_at;
                const uint8_t *selected = a.selected ? a.selected + batch * s.batch + head * s.head + r * s.row : nullptr;
                const int count = int(std::min<int64_t>(BLOCK, a.q_len - r * BLOCK));
                for (int shift = 0; shift < count; shift += GROUP) {
                    State &state = work.states[groups.size()];
                    const int queries = std::min(GROUP, count - shift);
                    groups.push_back({a, work, state, form, batch, head, order + shift, queries, shift, {}});
                    groups.back().read_segments();
                    gather(groups.back(), row, selected, ranges);
                    if (groups.size() == work.states.size()) attend_in_step(groups);
                }
            }
            attend_in_step(groups);
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
    if (a->batches * a->heads * a->q_len == 0) return;
#ifdef HAS_TILES
    if (a->form == TILES) return a->is_float16 ? attend<Tiles<Float16>>(*a) : attend<Tiles<Bfloat16>>(*a);
#endif
#ifdef HAS_PAIRS
    if (a->form == PAIRS) return attend<Pairs<Bfloat16>>(*a);
#endif
    attend<Singles>(*a);
}
