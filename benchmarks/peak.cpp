// The most that one core multiplies and adds in registers alone: each function returns the operations of `rounds` rounds.
#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#define ANEW(x) asm volatile("" : "+v"(x))  // another value each time, for all that the compiler knows
#elif defined(__x86_64__)
#define ANEW(x) asm volatile("" : "+x"(x))
#else
#define ANEW(x) asm volatile("" : "+w"(x))
#endif

namespace {
[[maybe_unused]] constexpr int CHAINS = 24;  // enough to hide how long one product takes
volatile float kept;
}  // namespace

extern "C" double singles(int64_t rounds) {
#if defined(__AVX512F__)
    constexpr int LANES = 16, OWN = CHAINS;
#elif defined(__AVX__)
    constexpr int LANES = 8, OWN = CHAINS / 2;
#else
    constexpr int LANES = 4, OWN = CHAINS / 2;
#endif
    typedef float Vec __attribute__((vector_size(LANES * 4)));
    Vec sum[OWN] = {};
    Vec x = Vec{} + 0.5f;
    const Vec y = Vec{} + 0.25f;
    for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 24
        for (int c = 0; c < OWN; c++) {
            ANEW(x);
            sum[c] += x * y;
        }
    }
    for (int c = 0; c < OWN; c++) kept = sum[c][0];
    return 2.0 * LANES * OWN * double(rounds);
}

extern "C" double pairs(int64_t rounds) {
#if defined(__AVX512BF16__)
    __m512 sum[CHAINS] = {};
    const __m512i y = _mm512_set1_epi16(0x3f00);
    __m512i x = y;
    for (int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 24
        for (int c = 0; c < CHAINS; c++) {
            ANEW(x);
            sum[c] = _mm512_dpbf16_ps(sum[c], (__m512bh)x, (__m512bh)y);
        }
    }
    for (int c = 0; c < CHAINS; c++) kept = sum[c][0];
    return 64.0 * CHAINS * double(rounds);
#else
    return 0.0 * double(rounds);
#endif
}

// For a process that may use tiles (arch_prctl).
extern "C" double tiles(int64_t rounds) {
#if defined(__AMX_BF16__)
    alignas(64) uint8_t sizes[64] = {1};
    for (int t = 0; t < 8; t++) sizes[16 + 2 * t] = 64, sizes[48 + t] = 16;
    asm volatile("" ::"r"(sizes) : "memory");
    _tile_loadconfig(sizes);
    for (int64_t r = 0; r < rounds; r++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 4.0 * 2 * 16 * 16 * 32 * double(rounds);
#else
    return 0.0 * double(rounds);
#endif
}
