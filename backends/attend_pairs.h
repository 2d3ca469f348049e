// Half precision: two products of bfloat16 at a time, summed in single precision.
//
// Probabilities are rounded to bfloat16 before they meet the values; their sum is that of the unrounded ones.  Keys and
// values are packed once a call: keys to whole words, values transposed, so that two neighbouring keys are one word.
// float16 has 11 bits: two bfloat16 of 8 bits each add up to it, so that it is computed in two parts, and so are
// probabilities then.  Only tiles are so fast that this pays.
#pragma once
#include "attend_products.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define HAS_PAIRS
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES
#endif
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#define HAS_PAIRS
#endif

#ifdef HAS_PAIRS
#include <algorithm>
#include <memory>
#include <vector>

namespace {

typedef uint32_t Word __attribute__((vector_size(LANES * 4)));
typedef uint16_t Half __attribute__((vector_size(LANES * 2)));
typedef uint16_t LooseHalf __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

// To the nearest bfloat16, in the upper half of each lane.
inline Word nearest(Vec x) {
    const Word u = (Word)x;
    return x == x ? u + 0x7fff + (u >> 16 & 1) : u | 0x400000;
}

#if defined(__ARM_NEON)
inline Vec add_products(Vec sum, Vec x, uint32_t y) {
    const bfloat16x8_t pair = vreinterpretq_bf16_u32(vdupq_n_u32(y));
    return (Vec)vbfdotq_f32((float32x4_t)sum, vreinterpretq_bf16_f32((float32x4_t)x), pair);
}
inline Vec pair(Vec low, Vec high) { return (Vec)(nearest(low) >> 16 | (nearest(high) & 0xffff0000u)); }
inline Vec power_of_two(Vec x) { return exponential(x * 0.693147180559945309f); }
#else
inline Vec add_products(Vec sum, Vec x, uint32_t y) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(int(y)));
}
inline Vec pair(Vec low, Vec high) {
    alignas(64) static constexpr uint16_t both[] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24,
                                                    9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i x = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(both), x);
}

// 2^x with an error of 2e-7; exactly 0 for -inf, NaN for NaN.
inline Vec power_of_two(Vec x) {
    x = (Vec)_mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)x);  // of a NaN, the second operand
    const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x less the integer below
    Vec p = splat(1.8775767e-3f);
    p = p * f + 8.9893397e-3f;
    p = p * f + 5.5826318e-2f;
    p = p * f + 2.4015361e-1f;
    p = p * f + 6.9315308e-1f;
    p = p * f + 9.9999994e-1f;
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}
#endif

inline Word all_ones(Word x, uint32_t bits) { return (Word)((x & bits) == (Word{} + bits)); }

struct Bfloat16 {
    static constexpr int PARTS = 1;
    static void split(Vec pair, Vec *parts) { parts[0] = pair; }
    static void join(Vec low, Vec high, Vec *parts) { parts[0] = pair(low, high); }
    static Word broken(Word pair) { return all_ones(pair, 0x7f80) | all_ones(pair, 0x7f800000); }
    static Half rounded(Vec x) { return __builtin_convertvector(nearest(x) >> 16, Half); }
};

#ifdef HAS_TILES
struct Float16 {
    static constexpr int PARTS = 2;
    static void split(Vec pair, Vec *parts) { join(wide((Word)pair & 0xffffu), wide((Word)pair >> 16), parts); }
    static void join(Vec low, Vec high, Vec *parts) {
        parts[0] = pair(low, high);
        const Word first = (Word)parts[0];
        parts[1] = pair(rest(low, (Vec)(first << 16)), rest(high, (Vec)(first & 0xffff0000u)));
    }
    static Vec rest(Vec x, Vec first) { return x - first == x - first ? x - first : Vec{}; }  // none of an infinity
    static Vec wide(Word x) { return (Vec)_mm512_cvtph_ps((__m256i)__builtin_convertvector(x, Half)); }
    static Word broken(Word pair) { return all_ones(pair, 0x7c00) | all_ones(pair, 0x7c000000); }
    static Half rounded(Vec x) { return (Half)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};
#endif

template <class Source> struct Pairs {
    typedef uint16_t Number;
    static constexpr int PARTS = Source::PARTS;
    static constexpr int IN_WORD = 2;
    static constexpr bool SCALES_QUERIES = false;  // that would round them; scores are scaled instead

    // Keys, [batches, heads, kv_len, parts, row], and values, [batches, heads, parts, value_dim, column].
    struct Shared {
        const Arguments &a;
        const int64_t batches, heads, row, column, part, per_head, pieces;
        std::unique_ptr<float[]> space;
        std::vector<uint8_t> broken;  // of a piece: some value is infinite or NaN
        Number *k, *v;

        explicit Shared(const Arguments &a)
            : a(a), batches(a.k_at.batch || a.v_at.batch ? a.batches : 1),
              heads(*std::max_element(a.kv_of_head, a.kv_of_head + a.heads) + 1), row(rounded(a.head_dim, 2 * LANES)),
              column(((a.kv_len / 32 + 2) | 1) * 32),  // an odd number of lines: neighbours are not of one set of a cache
              part(rounded(a.value_dim, LANES) * column), per_head((a.kv_len + CHUNK - 1) / CHUNK), pieces(batches * heads * per_head),
              broken(pieces) {
            const int64_t keys = (batches * heads * a.kv_len + TILE) * PARTS * row, values = batches * heads * PARTS * part;
            space.reset(new float[(keys + values) / 2 + 2 * LANES]);
            const uintptr_t size = LANES * sizeof(float);
            k = (Number *)rounded(int64_t(space.get()), int64_t(size));
            v = k + keys;
        }

        Number *keys(int64_t batch, int64_t head) const { return k + place(batch, head) * a.kv_len * PARTS * row; }
        Number *values(int64_t batch, int64_t head) const { return v + place(batch, head) * PARTS * part; }
        int64_t place(int64_t batch, int64_t head) const { return (batches == 1 ? 0 : batch) * heads + head; }

        void pack(int64_t piece) {
            const int64_t head = piece / per_head % heads, batch = piece / per_head / heads;
            const int64_t first = piece % per_head * CHUNK;
            int64_t end = std::min(first + CHUNK, a.kv_len);
            const Number *from = (const Number *)a.k + batch * a.k_at.batch + head * a.k_at.head;
            Number *to = keys(batch, head);
            for (int64_t j = first; j < end; j++)
                for (int64_t d = 0; d < a.head_dim; d += 2 * LANES) {
                    Vec pair = {}, parts[PARTS];
                    std::memcpy(&pair, from + j * a.k_at.row + d, std::min<size_t>(sizeof(Vec), 2 * (a.head_dim - d)));
                    Source::split(pair, parts);
                    for (int i = 0; i < PARTS; i++) *(Loose *)(to + (j * PARTS + i) * row + d) = parts[i];
                }
            from = (const Number *)a.v + batch * a.v_at.batch + head * a.v_at.head;
            to = values(batch, head);
            if (end == a.kv_len) end = column;  // zeros, which tiles take in
            for (int64_t j = first; j < end; j += 2 * LANES)
                for (int64_t d = 0; d < a.value_dim; d += LANES) broken[piece] |= turn(from, j, d, to + d * column + j);
        }

        bool is_broken(int64_t batch, int64_t head) const {
            const auto first = broken.begin() + place(batch, head) * per_head;
            return std::find(first, first + per_head, 1) != first + per_head;
        }

        // 2 * LANES keys of LANES features; 0 beyond the last ones.  Whether one is broken.
        bool turn(const Number *from, int64_t key, int64_t feature, Number *to) const {
            Vec t[LANES];
            const int width = int(std::min<int64_t>(LANES, a.value_dim - feature));
            const auto read = [&](int64_t j) {
                Half x = {};
                const Number *p = from + j * a.v_at.row + feature;
                if (j >= a.kv_len) return x;
                if (width == LANES) return Half(*(const LooseHalf *)p);
                for (int e = 0; e < width; e++) x[e] = p[e];
                return x;
            };
            for (int i = 0; i < LANES; i++) {
                const Word low = __builtin_convertvector(read(key + 2 * i), Word);
                t[i] = (Vec)(low | __builtin_convertvector(read(key + 2 * i + 1), Word) << 16);
            }
            transpose(t);
            Word most = {};
            for (int e = 0; e < LANES; e++) {
                most |= Source::broken((Word)t[e]);
                Vec parts[PARTS];
                Source::split(t[e], parts);
                for (int i = 0; i < PARTS; i++) *(Loose *)(to + i * part + e * column) = parts[i];
            }
            uint32_t found = 0;
            for (int e = 0; e < LANES; e++) found |= most[e];
            return found != 0;
        }
    };
    struct Setting {};

    const Number *k, *v;
    const int64_t words, value_dim, k_step, v_step, v_part;

    Pairs(const Arguments &a, const Shared &shared, const Setting &, int64_t batch, int64_t kv_head)
        : k(shared.keys(batch, kv_head)), v(shared.values(batch, kv_head)), words((a.head_dim + 1) / 2),
          value_dim(a.value_dim), k_step(PARTS * shared.row), v_step(shared.column), v_part(shared.part) {}

    static uint32_t word(const Number *x) {
        uint32_t both;
        std::memcpy(&both, x, sizeof both);
        return both;
    }
    static uint32_t last_word(const Number *x) { return *x; }  // the next key is another run's, or none
    static Vec product(Vec sum, Vec x, uint32_t y) { return add_products(sum, x, y); }
    static const Number *value(const Number *v, int64_t step, int64_t j, int64_t d) { return v + d * step + 2 * j; }
    static void query(Vec x, float scale, Vec *parts) {
        Source::split(scale < 0 ? (Vec)((Word)x ^ 0x80008000u) : x, parts);
    }
    static void store(Number *to, Vec x) { *(LooseHalf *)to = Source::rounded(x); }
    static Number number(float x) { return Source::rounded(splat(x))[0]; }

    void score(const float *q, int64_t key, int keys, float *s) const {
        all_scores<Pairs>(keys, q, k + key * k_step, k_step, words, s);
    }

    // Scores become pairs of e^(score * factor - base), which `total` takes in, their parts one after another.
    static float *weigh(float *s, int keys, float *p, float factor, const Vec *base, Vec *total) {
        const auto put = [&](int j, int n, Vec low, Vec high) {
            Vec parts[PARTS];
            Source::join(low, high, parts);
            for (int i = 0; i < PARTS; i++) at(p, i * PAIR_ROWS + j / 2, n) = parts[i];
        };
        constexpr float LOG2_E = 1.44269504088896341f;
        Vec start[VECTORS], sum[VECTORS] = {};
        for (int n = 0; n < VECTORS; n++) start[n] = base[n] * LOG2_E;
        factor *= LOG2_E;
        int j = 0;
        for (; j + 2 <= keys; j += 2)
            for (int n = 0; n < VECTORS; n++) {
                const Vec x = power_of_two(at(s, j, n) * factor - start[n]);
                const Vec y = power_of_two(at(s, j + 1, n) * factor - start[n]);
                sum[n] += x + y;
                put(j, n, x, y);
            }
        for (int n = 0; n < VECTORS && j < keys; n++) {
            const Vec x = power_of_two(at(s, j, n) * factor - start[n]);
            sum[n] += x;
            put(j, n, x, Vec{});
        }
        for (int n = 0; n < VECTORS; n++) total[n] += sum[n];
        return p;
    }

    // The least part times the least is lost.
    void add_values(float *p, int64_t key, int keys, float *o) const {
        mix_all<Pairs>(keys, value_dim, p, v + key, v_step, o);
        if constexpr (PARTS == 1) return;
        mix_all<Pairs>(keys, value_dim, p + PAIR_ROWS * GROUP, v + key, v_step, o);
        mix_all<Pairs>(keys, value_dim, p, v + v_part + key, v_step, o);
    }
};

#ifdef HAS_TILES
static_assert(LANES == TILE && VECTORS == 2);

// Linux lends a process the tiles that it asks for.
inline bool tiles_are_lent() {
    constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool given = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
    return given;
}

// Intel AMX: a tile has 16 rows of 64 bytes.
template <class Source> struct Tiles : Pairs<Source> {
    using Base = Pairs<Source>;
    using Base::PARTS;
    using typename Base::Number;

    // Another library may count on its own tiles in this thread: they come back.
    struct Setting {
        alignas(64) uint8_t before[64] = {};

        Setting() {
            alignas(64) uint8_t own[64] = {1};
            for (int t = 0; t < 8; t++) own[16 + 2 * t] = 64, own[48 + t] = TILE;
            asm volatile("" ::"r"(before), "r"(own) : "memory");
            _tile_storeconfig(before);
            _tile_loadconfig(own);
            asm volatile("" ::: "memory");
        }
        ~Setting() {
            asm volatile("" ::"r"(before) : "memory");
            _tile_loadconfig(before);
        }
        Setting(const Setting &) = delete;
    };

    const bool is_broken;

    Tiles(const Arguments &a, const typename Base::Shared &shared, const Setting &, int64_t batch, int64_t kv_head)
        : Base(a, shared, {}, batch, kv_head), is_broken(shared.is_broken(batch, kv_head)) {}

    // Rows of `to` take in the products of `words` words: two tiles of rows, or one, for the two vectors of queries.
    template <bool TWO, bool ADDS>
    static void multiply(const Number *rows, int64_t step, const float *x, int64_t words, float *to) {
        constexpr int64_t LINE = GROUP * sizeof(float);
        float *next = to + TILE * GROUP;
        const int64_t bytes = step * sizeof(Number);
        if constexpr (ADDS) {
            _tile_loadd(0, &at(to, 0, 0), LINE);
            _tile_loadd(1, &at(to, 0, 1), LINE);
            if constexpr (TWO) _tile_loadd(2, &at(next, 0, 0), LINE);
            if constexpr (TWO) _tile_loadd(3, &at(next, 0, 1), LINE);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (TWO) _tile_zero(2);
            if constexpr (TWO) _tile_zero(3);
        }
        for (int part = 0; part < PARTS * PARTS; part++) {  // all with all, unless this adds: then of one alone
            if (ADDS && part) break;
            const Number *row = rows + part % PARTS * 2 * words;
            const float *column = x + part / PARTS * words * GROUP;
            for (int64_t w = 0; w < words; w += LANES) {
                _tile_loadd(6, &at(column, w, 0), LINE);
                _tile_loadd(7, &at(column, w, 1), LINE);
                _tile_loadd(4, row + 2 * w, bytes);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if constexpr (TWO) {
                    _tile_loadd(5, row + TILE * step + 2 * w, bytes);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
        _tile_stored(0, &at(to, 0, 0), LINE);
        _tile_stored(1, &at(to, 0, 1), LINE);
        if constexpr (TWO) _tile_stored(2, &at(next, 0, 0), LINE);
        if constexpr (TWO) _tile_stored(3, &at(next, 0, 1), LINE);
    }

    template <bool ADDS>
    static void multiply(int64_t count, const Number *rows, int64_t step, const float *x, int64_t words, float *to) {
        asm volatile("" ::: "memory");  // compilers do not know what a tile reads
        int64_t r = 0;
        for (; r + TILE < count; r += 2 * TILE)
            multiply<true, ADDS>(rows + r * step, step, x, words, to + r * GROUP);
        if (r < count) multiply<false, ADDS>(rows + r * step, step, x, words, to + r * GROUP);
    }

    // Scores of the keys behind the last are written, too: those of the next run take their place.
    void score(const float *q, int64_t key, int keys, float *s) const {
        multiply<false>(keys, this->k + key * this->k_step, this->k_step, q, rounded(this->words, LANES), s);
    }

    // Keys behind the last have a probability of 0, which hides any finite value.
    void add_values(float *p, int64_t key, int keys, float *o) const {
        if (is_broken) return Base::add_values(p, key, keys, o);
        const int64_t pairs = (keys + 1) / 2, words = rounded(pairs, LANES), rows = rounded(this->value_dim, TILE);
        const Number *v = this->v + key;
        for (int i = 0; i < PARTS; i++)
            std::memset(&at(p, i * PAIR_ROWS + pairs, 0), 0, sizeof(float) * GROUP * (words - pairs));
        multiply<true>(rows, v, this->v_step, p, words, o);
        if constexpr (PARTS == 1) return;
        multiply<true>(rows, v, this->v_step, p + PAIR_ROWS * GROUP, words, o);
        multiply<true>(rows, v + this->v_part, this->v_step, p, words, o);
    }
};
#endif

}  // namespace
#endif
