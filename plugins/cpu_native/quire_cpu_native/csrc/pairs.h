// Queries, keys, weights and values as bf16, whose products one instruction sums by pairs.
#pragma once
#include "floats.h"

#if defined(QUIRE_ISA_AVX512BF16)
namespace quire {

// As `Floats`.
class Pairs {
   public:
    static constexpr int64_t UNIT = 2 * W;
    using Weight = bf16;

    float *queries, *piece;
    int64_t dim, v_dim, size, v_size;

    void take_query(int64_t r, const bf16* from) {
        bf16* to = (bf16*)queries + r * size;
        memcpy(to, from, dim * sizeof(bf16)), memset(to + dim, 0, (size - dim) * sizeof(bf16));
    }

    // Four keys meet a query at a time, with eight elements each: position 16 g + 4 q + e lies in quarter q of vector e
    // of [g][elements / 8][4]. So a vector of sums is that of four keys, and few steps make one sum of each quarter.
    template <class Fetch>
    void take_keys(const Cache<bf16>& cache, const int64_t* places, int64_t h, int64_t begin, int64_t stop,
                   const Fetch& fetch) {
        auto key = [&](int64_t j) {
            j = std::min(std::max(j, begin), stop - 1);
            fetch(j);
            return cache.elements + (places[j] + h) * dim;
        };
        for (int64_t g = begin / W * W; g < stop; g += W)
            for (int64_t e = 0; e < 4; e++) {
                const bf16* rows[4] = {key(g + e), key(g + 4 + e), key(g + 8 + e), key(g + 12 + e)};
                for (int64_t d = 0; d < size; d += UNIT) turn(rows, d, (bf16*)piece + g * size + d * W + e * UNIT);
            }
    }

    template <int R>
    void score(int64_t r, float* to, int64_t apart, int64_t stop) const {
        for (int64_t g = 0; g < stop; g += W) dots<R>((const bf16*)queries + r * size, to + g, apart, g);
    }

    void weigh(float* s, int64_t first, int64_t stop, float scale, float top) const {
        for (int64_t j = first; j < stop; j += UNIT) {
            V a = power(s + j, scale, top), b = power(s + j + W, scale, top);
            __m512bh both = _mm512_cvtne2ps_pbh(b, a);
            memcpy((bf16*)s + j, &both, sizeof both);
        }
    }
    // Of the weights as they are multiplied, rounded.
    float total(const bf16* first, const bf16* stop) const {
        V all = zero();
        for (; first < stop; first += UNIT) all = _mm512_dpbf16_ps(all, pairs(first), twice(0x3f80));
        return sum(all);
    }

    // Values of two positions as pairs: [PIECE / 2][v_size / 32][2][16][2], the lower elements of each eight first.
    template <class Fetch>
    void take_values(const Cache<bf16>& cache, const int64_t* places, int64_t h, int64_t begin, int64_t stop,
                     const Fetch& fetch) {
        const I nothing = zero_int();
        auto row = [&](int64_t j) -> const bf16* {
            if (j < begin || j >= stop) return nullptr;
            fetch(j);
            return cache.elements + (places[j] + h) * v_dim;
        };
        for (int64_t j = begin / 2 * 2; j < stop; j += 2) {
            const bf16 *first = row(j), *second = row(j + 1);
            bf16* to = (bf16*)piece + j * v_size;
            for (int64_t d = 0; d < v_size; d += UNIT, to += 2 * UNIT) {
                I a = first ? some(first + d, v_dim - d) : nothing, b = second ? some(second + d, v_dim - d) : nothing;
                _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
                _mm512_storeu_si512(to + UNIT, _mm512_unpackhi_epi16(a, b));
            }
        }
    }

    template <int R>
    void gather(const bf16* weights, int64_t apart, int64_t begin, int64_t stop, State* states) const {
        constexpr int NV = R == 4 ? 4 : 8;
        int64_t d = 0;
        for (; d + NV * W <= v_size; d += NV * W) add_values<R, NV>(weights, apart, begin / 2 * 2, stop, states, d);
        for (; d < v_size; d += UNIT) add_values<R, 2>(weights, apart, begin / 2 * 2, stop, states, d);
    }

    // Sums of values from the order of their pairs to that of elements.
    void put_in_order(float* values) const {
        for (int64_t d = 0; d < v_size; d += UNIT) {
            I low = load_int(values + d), high = load_int(values + d + W);
            I a = _mm512_shuffle_i32x4(low, high, 0x44), b = _mm512_shuffle_i32x4(low, high, 0xee);
            _mm512_storeu_si512(values + d, _mm512_shuffle_i32x4(a, a, 0xd8));
            _mm512_storeu_si512(values + d + W, _mm512_shuffle_i32x4(b, b, 0xd8));
        }
    }

   private:
    static __m512bh pairs(const void* from) {
        __m512bh out;
        memcpy(&out, from, sizeof out);
        return out;
    }
    static __m512bh pairs(I x) { return pairs(&x); }
    static __m512bh twice(int32_t x) { return pairs(set1_int(x << 16 | x)); }
    static I some(const bf16* from, int64_t count) {
        if (count >= UNIT) return load_int(from);
        bf16 padded[UNIT] = {};
        memcpy(padded, from, count * sizeof(bf16));
        return load_int(padded);
    }

    // 32 elements of four rows -> four vectors of eight elements of each, four vectors apart.
    void turn(const bf16* const rows[4], int64_t d, bf16* to) const {
        I x[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) x[q] = some(rows[q] + d, dim - d);
        I a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
        I c = _mm512_shuffle_i32x4(x[0], x[1], 0xee), e = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
        _mm512_storeu_si512(to, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(to + 4 * UNIT, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(to + 8 * UNIT, _mm512_shuffle_i32x4(c, e, 0x88));
        _mm512_storeu_si512(to + 12 * UNIT, _mm512_shuffle_i32x4(c, e, 0xdd));
    }

    // Scores of R rows with the sixteen positions from g on.
    template <int R>
    void dots(const bf16* first, float* to, int64_t apart, int64_t g) const {
        V dot[R][4] = {};
        const bf16* keys = (const bf16*)piece + g * size;
        for (int64_t d = 0; d < size; d += 8, keys += 4 * UNIT) {
            __m512bh key[4];
#pragma GCC unroll 4
            for (int e = 0; e < 4; e++) key[e] = pairs(keys + e * UNIT);
#pragma GCC unroll 4
            for (int i = 0; i < R; i++) {
                __m128i eight = _mm_loadu_si128((const __m128i*)(first + i * size + d));
                __m512bh query = pairs(_mm512_broadcast_i32x4(eight));
#pragma GCC unroll 4
                for (int e = 0; e < 4; e++) dot[i][e] = _mm512_dpbf16_ps(dot[i][e], query, key[e]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) store(to + i * apart, sums_of_quarters(dot[i]));
    }

    // The four sums of quarter q of vector e are lane 4 q + e.
    static V sums_of_quarters(const V x[4]) {
        V a = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        V b = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        return add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }

    // e^(s · scale - top), which is at most 1, to about four parts in 10^5: more than a bf16 tells.
    static V power(const float* s, float scale, float top) {
        constexpr float log2_e = 1.44269504f;
        V x = fma(load(s), set1(scale * log2_e), set1(-top * log2_e));
        V n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = sub(x, n);
        V p = fma(set1(0.00961813f), r, set1(0.05550411f));
        p = fma(p, r, set1(0.24022651f));
        p = fma(p, r, set1(0.69314718f));
        return _mm512_scalef_ps(fma(p, r, set1(1.0f)), n);
    }

    template <int R, int NV>
    void add_values(const bf16* weights, int64_t apart, int64_t begin, int64_t stop, State* states, int64_t d) const {
        V sums[R][NV];
#pragma GCC unroll 4
        for (int i = 0; i < R; i++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) sums[i][v] = load(states[i].values + d + v * W);
        for (int64_t j = begin; j < stop; j += 2) {
            const bf16* from = (const bf16*)piece + j * v_size + 2 * d;
            __m512bh one[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) one[v] = pairs(from + v * UNIT);
#pragma GCC unroll 4
            for (int i = 0; i < R; i++) {
                int32_t both;
                memcpy(&both, weights + i * apart + j, sizeof both);
                __m512bh weight = pairs(set1_int(both));
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], weight, one[v]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; i++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) store(states[i].values + d + v * W, sums[i][v]);
    }
};

}  // namespace quire
#endif
