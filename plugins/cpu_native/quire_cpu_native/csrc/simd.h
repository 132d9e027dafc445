// One vector of floats, `V`, of `W` lanes, and the few operations that the kernels are written in.
// Which instructions stand behind it is decided by the macro QUIRE_ISA_*, set together with the compiler's flags.
// No operation may be contracted or reordered by the compiler: a row's bits must not depend on its neighbours.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(QUIRE_ISA_AVX512BF16) || defined(QUIRE_ISA_AVX512)
#define QUIRE_512 1
#endif

#if defined(QUIRE_SIMDE)
#include "emulated.h"
#elif defined(QUIRE_512) || defined(QUIRE_ISA_AVX2)
#include <immintrin.h>
#endif

#if defined(__GNUC__)  // a function that only fetches has no effect that the compiler sees: not inlined, it is left out
#define QUIRE_INLINE __attribute__((always_inline))
#else
#define QUIRE_INLINE
#endif

namespace quire {

// Fetches memory that is needed soon, or later: to the second level of caches.
QUIRE_INLINE static inline void fetch_soon(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#endif
}
QUIRE_INLINE static inline void fetch_later(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#endif
}

using bf16 = uint16_t;
struct half {
    uint16_t bits;
};

static inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline float to_float(float x) { return x; }

// Of a finite half.
static inline float to_float(half x) {
    int exponent = x.bits >> 10 & 31;
    float value = ldexpf((float)((x.bits & 1023) + (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
    return x.bits >> 15 ? -value : value;
}

// To the nearest, ties to even; a NaN stays one.
static inline bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static inline void put(bf16* p, float x) { *p = to_bf16(x); }
static inline void put(float* p, float x) { *p = x; }

#if defined(QUIRE_512)

using V = __m512;
constexpr int W = 16;
static inline V zero() { return _mm512_setzero_ps(); }
static inline V set1(float x) { return _mm512_set1_ps(x); }
static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
static inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
static inline V div(V a, V b) { return _mm512_div_ps(a, b); }
static inline V max(V a, V b) { return _mm512_max_ps(a, b); }
static inline V min(V a, V b) { return _mm512_min_ps(a, b); }
static inline V load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
// Of W pairs of bf16, the first of each and the second of each.
static inline V first_of_pairs(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
static inline V second_of_pairs(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000u)));
}
static inline void store(bf16* p, V x) {
    __m512i bits = _mm512_castps_si512(x), one = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), one), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc0))));
}
// 2^n for whole numbers n in [-126, 127]
static inline V power_of_two(V n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
static inline V round_to_even(V x) { return _mm512_cvtepi32_ps(_mm512_cvtps_epi32(x)); }
using I = __m512i;
static inline I zero_int() { return _mm512_setzero_si512(); }
static inline I load_int(const void* p) { return _mm512_loadu_si512(p); }
static inline I set1_int(int32_t x) { return _mm512_set1_epi32(x); }
static inline V to_float(I x) { return _mm512_cvtepi32_ps(x); }
static inline I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
static inline I sub_of16(I a, I b) { return _mm512_sub_epi16(a, b); }
// the bits of `mask` of each 32 bits, as floats, of 16 or of 8; `shift` bits further up
static inline V field(I x, int shift, int mask) {
    return to_float(_mm512_and_si512(_mm512_srli_epi32(x, shift), set1_int(mask)));
}
static inline I field_of16(I x, int shift, int mask) {
    return _mm512_and_si512(_mm512_srli_epi16(x, shift), set1_int((int32_t)(mask * 0x00010001u)));
}
static inline I field_of8(I x, int mask) { return _mm512_and_si512(x, set1_int((int32_t)(mask * 0x01010101u))); }
// a byte's bits N lower; what comes in above them is anything
template <int N>
static inline I lowered(I x) { return _mm512_srli_epi16(x, N); }
// of each byte the bits of a that `mask` has, and the others of b
static inline I merged(int mask, I a, I b) {
    return _mm512_ternarylogic_epi32(set1_int((int32_t)(mask * 0x01010101u)), a, b, 0xca);
}
// c + a.first * b.first + a.second * b.second of signed halves
#if defined(QUIRE_ISA_AVX512BF16)  // which is taken together with VNNI
static inline I add_products(I c, I a, I b) { return _mm512_dpwssd_epi32(c, a, b); }
#else
static inline I add_products(I c, I a, I b) { return _mm512_add_epi32(c, _mm512_madd_epi16(a, b)); }
#endif
// c + products of unsigned bytes of a with signed bytes of b, summed by pairs or fours; `whole_sums` of it: by fours
#if defined(QUIRE_ISA_AVX512BF16)
constexpr bool FOURS_AT_ONCE = true;  // whether `whole_sums` has nothing left to do
static inline I add_byte_products(I c, I a, I b) { return _mm512_dpbusd_epi32(c, a, b); }
static inline I whole_sums(I c) { return c; }
#else
constexpr bool FOURS_AT_ONCE = false;
static inline I add_byte_products(I c, I a, I b) { return _mm512_add_epi16(c, _mm512_maddubs_epi16(a, b)); }
static inline I whole_sums(I c) { return _mm512_madd_epi16(c, set1_int(0x00010001)); }
#endif
// Codes of 8 bits, as they are multiplied: less `TAKEN_OFF`, by signed bytes b of -127 to 127, whose products with them
// are summed by fours.
#if defined(QUIRE_ISA_AVX512BF16)
constexpr float TAKEN_OFF = 0.0f;
struct Factors {
    I codes;
};
static inline Factors factors(I codes) { return {codes}; }
static inline I add_code_products(I c, Factors a, I b) { return _mm512_dpbusd_epi32(c, a.codes, b); }
#else
constexpr float TAKEN_OFF = 128.0f;
struct Factors {
    I sizes;
    __mmask64 negative;
};
static inline Factors factors(I codes) {
    I centred = _mm512_xor_si512(codes, set1_int((int)0x80808080u));
    return {_mm512_abs_epi8(centred), _mm512_movepi8_mask(centred)};
}
// 128 · 127 · 2 < 2^15: the sign stands with b, so that pairs do not saturate.
static inline I add_code_products(I c, Factors a, I b) {
    I pairs = _mm512_maddubs_epi16(a.sizes, _mm512_mask_sub_epi8(b, a.negative, zero_int(), b));
    return _mm512_add_epi32(c, whole_sums(pairs));
}
#endif
static inline V load(const int8_t* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
static inline V load(const half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

#elif defined(QUIRE_ISA_AVX2)

using V = __m256;
constexpr int W = 8;
static inline V zero() { return _mm256_setzero_ps(); }
static inline V set1(float x) { return _mm256_set1_ps(x); }
static inline V load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
static inline V add(V a, V b) { return _mm256_add_ps(a, b); }
static inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
static inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
static inline V div(V a, V b) { return _mm256_div_ps(a, b); }
static inline V max(V a, V b) { return _mm256_max_ps(a, b); }
static inline V min(V a, V b) { return _mm256_min_ps(a, b); }
static inline V load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline V first_of_pairs(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16));
}
static inline V second_of_pairs(const bf16* p) {
    const __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), mask));
}
static inline void store(bf16* p, V x) {
    __m256i bits = _mm256_castps_si256(x), one = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), one), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1)));
}
static inline V power_of_two(V n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline V round_to_even(V x) { return _mm256_cvtepi32_ps(_mm256_cvtps_epi32(x)); }
using I = __m256i;
static inline I zero_int() { return _mm256_setzero_si256(); }
static inline I load_int(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline I set1_int(int32_t x) { return _mm256_set1_epi32(x); }
static inline V to_float(I x) { return _mm256_cvtepi32_ps(x); }
static inline I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
static inline I sub_of16(I a, I b) { return _mm256_sub_epi16(a, b); }
static inline V field(I x, int shift, int mask) {
    return to_float(_mm256_and_si256(_mm256_srli_epi32(x, shift), set1_int(mask)));
}
static inline I field_of16(I x, int shift, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(x, shift), set1_int((int32_t)(mask * 0x00010001u)));
}
static inline I field_of8(I x, int mask) { return _mm256_and_si256(x, set1_int((int32_t)(mask * 0x01010101u))); }
template <int N>
static inline I lowered(I x) { return _mm256_srli_epi16(x, N); }
static inline I merged(int mask, I a, I b) {
    return _mm256_or_si256(field_of8(a, mask), _mm256_andnot_si256(set1_int((int32_t)(mask * 0x01010101u)), b));
}
#if defined(__GNUC__)
// As one piece: a compiler that sees two operations multiplies everything before it adds, and runs out of registers.
static inline I add_products(I c, I a, I b) {
    I products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(c), "=&x"(products) : "x"(a), "x"(b));
    return c;
}
#else
static inline I add_products(I c, I a, I b) { return _mm256_add_epi32(c, _mm256_madd_epi16(a, b)); }
#endif
constexpr bool FOURS_AT_ONCE = false;
static inline I add_byte_products(I c, I a, I b) { return _mm256_add_epi16(c, _mm256_maddubs_epi16(a, b)); }
static inline I whole_sums(I c) { return _mm256_madd_epi16(c, set1_int(0x00010001)); }
constexpr float TAKEN_OFF = 128.0f;
struct Factors {
    I sizes, centred;
};
static inline Factors factors(I codes) {
    I centred = _mm256_xor_si256(codes, set1_int((int)0x80808080u));
    return {_mm256_abs_epi8(centred), centred};
}
static inline I add_code_products(I c, Factors a, I b) {
    return _mm256_add_epi32(c, whole_sums(_mm256_maddubs_epi16(a.sizes, _mm256_sign_epi8(b, a.centred))));
}
static inline V load(const int8_t* p) { return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
static inline V load(const half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

#elif defined(QUIRE_ISA_NEON) || defined(QUIRE_ISA_NEONDOT)

}  // namespace quire
#include "neon.h"
namespace quire {

#else  // whatever the compiler makes of arrays of eight

constexpr int W = 8;
struct V {
    float at[W];
};
template <class F>
static inline V lanes(F f) {
    V out;
    for (int i = 0; i < W; i++) out.at[i] = f(i);
    return out;
}
static inline V zero() { return V{}; }
static inline V set1(float x) { return lanes([=](int) { return x; }); }
static inline V load(const float* p) { return lanes([=](int i) { return p[i]; }); }
static inline void store(float* p, V x) { memcpy(p, x.at, sizeof x.at); }
static inline V fma(V a, V b, V c) { return lanes([&](int i) { return a.at[i] * b.at[i] + c.at[i]; }); }
static inline V add(V a, V b) { return lanes([&](int i) { return a.at[i] + b.at[i]; }); }
static inline V sub(V a, V b) { return lanes([&](int i) { return a.at[i] - b.at[i]; }); }
static inline V mul(V a, V b) { return lanes([&](int i) { return a.at[i] * b.at[i]; }); }
static inline V div(V a, V b) { return lanes([&](int i) { return a.at[i] / b.at[i]; }); }
static inline V max(V a, V b) { return lanes([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; }); }
static inline V min(V a, V b) { return lanes([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; }); }
static inline V load(const bf16* p) { return lanes([=](int i) { return to_float(p[i]); }); }
static inline V first_of_pairs(const bf16* p) { return lanes([=](int i) { return to_float(p[2 * i]); }); }
static inline V second_of_pairs(const bf16* p) { return lanes([=](int i) { return to_float(p[2 * i + 1]); }); }
static inline void store(bf16* p, V x) {
    for (int i = 0; i < W; i++) p[i] = to_bf16(x.at[i]);
}
static inline V power_of_two(V n) { return lanes([&](int i) { return ldexpf(1.0f, (int)n.at[i]); }); }
static inline V round_to_even(V x) { return lanes([&](int i) { return nearbyintf(x.at[i]); }); }
struct I {
    uint32_t at[W];
};
static inline I zero_int() { return I{}; }
static inline I load_int(const void* p) {
    I out;
    memcpy(out.at, p, sizeof out.at);
    return out;
}
static inline I set1_int(int32_t x) {
    I out;
    for (uint32_t& each : out.at) each = (uint32_t)x;
    return out;
}
static inline V to_float(I x) { return lanes([&](int i) { return (float)(int32_t)x.at[i]; }); }
static inline I add_int(I a, I b) {
    for (int i = 0; i < W; i++) a.at[i] += b.at[i];
    return a;
}
static inline I sub_of16(I a, I b) {
    for (int i = 0; i < W; i++)
        a.at[i] = ((a.at[i] & 0xffff0000u) - (b.at[i] & 0xffff0000u)) | ((a.at[i] - b.at[i]) & 0xffffu);
    return a;
}
static inline V field(I x, int shift, int mask) {
    return lanes([&](int i) { return (float)(x.at[i] >> shift & (uint32_t)mask); });
}
static inline I field_of16(I x, int shift, int mask) {
    for (uint32_t& each : x.at) each = each >> shift & (uint32_t)mask * 0x00010001u;
    return x;
}
static inline I field_of8(I x, int mask) {
    for (uint32_t& each : x.at) each &= (uint32_t)mask * 0x01010101u;
    return x;
}
template <int N>
static inline I lowered(I x) {
    for (uint32_t& each : x.at) each >>= N;
    return x;
}
static inline I merged(int mask, I a, I b) {
    const uint32_t wide = (uint32_t)mask * 0x01010101u;
    for (int i = 0; i < W; i++) a.at[i] = (a.at[i] & wide) | (b.at[i] & ~wide);
    return a;
}
static inline I add_products(I c, I a, I b) {
    for (int i = 0; i < W; i++)
        c.at[i] += (uint32_t)((int16_t)a.at[i] * (int16_t)b.at[i] + (int16_t)(a.at[i] >> 16) * (int16_t)(b.at[i] >> 16));
    return c;
}
constexpr bool FOURS_AT_ONCE = true;
static inline I add_byte_products(I c, I a, I b) {
    for (int i = 0; i < W; i++)
        for (int shift = 0; shift < 32; shift += 8)
            c.at[i] += (uint32_t)((int32_t)(a.at[i] >> shift & 255) * (int8_t)(b.at[i] >> shift));
    return c;
}
static inline I whole_sums(I c) { return c; }
constexpr float TAKEN_OFF = 0.0f;
struct Factors {
    I codes;
};
static inline Factors factors(I codes) { return {codes}; }
static inline I add_code_products(I c, Factors a, I b) { return add_byte_products(c, a.codes, b); }
static inline V load(const int8_t* p) { return lanes([=](int i) { return (float)p[i]; }); }
static inline V load(const half* p) { return lanes([=](int i) { return to_float(p[i]); }); }

#endif

// n elements; the lanes behind them are zero.
template <class T>
static inline V load_some(const T* p, int64_t n) {
    if (n >= W) return load(p);
    T padded[W] = {};
    memcpy(padded, p, n * sizeof(T));
    return load(padded);
}
template <class T>
static inline void store_some(T* p, V x, int64_t n) {
    if (n >= W) return store(p, x);
    T all[W];
    store(all, x);
    memcpy(p, all, n * sizeof(T));
}

// Sums in a fixed order: lanes i and i + W/2 first.
static inline float sum(V x) {
#if (defined(QUIRE_512) || defined(QUIRE_ISA_AVX2)) && !defined(QUIRE_SIMDE)
#if defined(QUIRE_512)
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
    __m256 eight = x;
#endif
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float a[W];
    store(a, x);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
#endif
}

constexpr int TOGETHER = W == 16 ? 16 : 8;  // vectors that `sums` takes
// The sums of as many vectors, each in the same order.
static inline void sums(const V* x, float* out) {
#if defined(QUIRE_512) && !defined(QUIRE_SIMDE)
    V eighths[8], quarters[4], halves[2];  // of 8 lanes of two vectors, 4 of four, 2 of eight; which ones: see the last line
    const int place[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    for (int i = 0; i < 8; i++) {
        V a = x[place[2 * i]], b = x[place[2 * i + 1]];
        eighths[i] = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; i++) {
        V a = eighths[2 * i], b = eighths[2 * i + 1];
        quarters[i] = add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; i++) {
        V a = quarters[2 * i], b = quarters[2 * i + 1];
        halves[i] = add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    store(out, add(_mm512_shuffle_ps(halves[0], halves[1], 0x88), _mm512_shuffle_ps(halves[0], halves[1], 0xdd)));
#else
    for (int i = 0; i < TOGETHER; i++) out[i] = sum(x[i]);
#endif
}
static inline float largest(V x) {
#if defined(QUIRE_512) && !defined(QUIRE_SIMDE)
    return _mm512_reduce_max_ps(x);
#endif
    float a[W];
    store(a, x);
    float best = a[0];
    for (int i = 1; i < W; i++) best = a[i] > best ? a[i] : best;
    return best;
}

// e^x to about one part in 10^7; below -87.3 a tiny number. Coefficients as in Cephes (Moshier 1992).
static inline V exp(V x) {
    x = max(min(x, set1(88.0f)), set1(-87.3f));
    V n = round_to_even(mul(x, set1(1.44269504f)));
    V r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    V p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(mul(p, r), r, add(r, set1(1.0f)));
    return mul(p, power_of_two(n));
}
static inline float exp1(float x) {
    float all[W];
    store(all, exp(set1(x)));
    return all[0];
}
static inline V tanh(V x) {
    V e = exp(mul(x, set1(2.0f)));
    return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

// n whole numbers of at most 8 bits.
static inline void store_some(int8_t* p, V x, int64_t n) {
#if defined(QUIRE_512)
    if (n >= W) return _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
#elif defined(QUIRE_ISA_AVX2)
    __m256i whole = _mm256_cvtps_epi32(x);
    __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    if (n >= W) return _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(halves, halves));
#endif
    float wide[W];
    store(wide, x);
    for (int64_t i = 0; i < n; i++) p[i] = (int8_t)wide[i];
}

// n whole numbers of at most 16 bits, in the order in which those of four bytes meet in products: first the even ones.
static inline void store_some(int16_t* p, V x, int64_t n) {
    constexpr int ORDER[] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
    int16_t all[W];
#if defined(QUIRE_512)
    I moved = _mm512_permutexvar_epi32(load_int(ORDER), _mm512_cvtps_epi32(x));
    _mm256_storeu_si256((__m256i*)(n == W ? p : all), _mm512_cvtepi32_epi16(moved));
#elif defined(QUIRE_ISA_AVX2)
    I moved = _mm256_permutevar8x32_epi32(_mm256_cvtps_epi32(x), load_int(ORDER));
    __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(moved), _mm256_extracti128_si256(moved, 1));
    _mm_storeu_si128((__m128i*)(n == W ? p : all), narrow);
#else
    float wide[W];
    store(wide, x);
    for (int i = 0; i < W; i++) (n == W ? p : all)[i] = (int16_t)wide[ORDER[i]];
#endif
    if (n < W) memcpy(p, all, n * sizeof(int16_t));
}

}  // namespace quire
