// Output tiles in registers: MB rows of x times NV vectors of columns. Each output is one chain of additions over the
// inputs in their order, whatever the tile, so that a row's bits do not depend on how many rows there are.
#pragma once
#include "simd.h"

namespace quire {

constexpr int PANEL = 64;  // output columns that are packed together

// w: float, rows of inputs `stride` apart.
template <int MB, int NV>
static inline void tile(const float* w, int64_t stride, const float* x, int64_t ldx, int64_t inputs, V acc[MB][NV]) {
    for (int64_t k = 0; k < inputs; k++) {
        V column[NV];
        for (int v = 0; v < NV; v++) column[v] = load(w + k * stride + v * W);
        for (int m = 0; m < MB; m++) {
            V value = set1(x[m * ldx + k]);
            for (int v = 0; v < NV; v++) acc[m][v] = fma(value, column[v], acc[m][v]);
        }
    }
}

// w: bf16 in pairs of inputs, [inputs / 2][PANEL][2]; the last pair is padded with zeros.
template <int MB, int NV>
static inline void tile(const bf16* w, int64_t stride, const float* x, int64_t ldx, int64_t inputs, V acc[MB][NV]) {
    for (int64_t k = 0; k + 1 < inputs; k += 2) {
        const bf16* pair = w + k * stride;
#if defined(__GNUC__)
        if (MB <= 2)
            for (int v = 0; v < NV; v += 64 / (4 * W)) __builtin_prefetch(pair + 2 * v * W + 2048);
#endif
        for (int v = 0; v < NV; v++) {
            V first = first_of_pairs(pair + 2 * v * W), second = second_of_pairs(pair + 2 * v * W);
            for (int m = 0; m < MB; m++) {
                acc[m][v] = fma(set1(x[m * ldx + k]), first, acc[m][v]);
                acc[m][v] = fma(set1(x[m * ldx + k + 1]), second, acc[m][v]);
            }
        }
    }
    if (inputs % 2 == 0) return;
    const bf16* pair = w + (inputs - 1) * stride;
    for (int v = 0; v < NV; v++) {
        V first = first_of_pairs(pair + 2 * v * W);
        for (int m = 0; m < MB; m++) acc[m][v] = fma(set1(x[m * ldx + inputs - 1]), first, acc[m][v]);
    }
}

#if defined(QUIRE_ISA_AVX512BF16)
// The same with x in bf16: pairs of products are summed by one instruction. `inputs` is even.
template <int MB, int NV>
static inline void tile(const bf16* w, int64_t stride, const bf16* x, int64_t ldx, int64_t inputs, V acc[MB][NV]) {
    for (int64_t k = 0; k < inputs; k += 2) {
        const bf16* pair = w + k * stride;
        __m512bh column[NV];
        for (int v = 0; v < NV; v++) {
            memcpy(&column[v], pair + 2 * v * W, sizeof column[v]);
            if (MB <= 2) __builtin_prefetch(pair + 2 * v * W + 2048);
        }
        for (int m = 0; m < MB; m++) {
            int32_t both;
            memcpy(&both, x + m * ldx + k, 4);
            __m512i all = _mm512_set1_epi32(both);
            __m512bh value;
            memcpy(&value, &all, sizeof value);
            for (int v = 0; v < NV; v++) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], column[v], value);
        }
    }
}
#endif

// Columns 0 to `columns` - 1 of the tile, plus bias, to out.
template <class T, int MB, int NV>
static inline void emit(V acc[MB][NV], T* out, int64_t ldo, int64_t columns, const T* bias) {
    for (int m = 0; m < MB; m++)
        for (int v = 0; v < NV; v++) {
            int64_t at = v * W, left = columns - at;
            if (left >= W)
                store(out + m * ldo + at, bias ? add(acc[m][v], load(bias + at)) : acc[m][v]);
            else if (left > 0)
                store_some(out + m * ldo + at, bias ? add(acc[m][v], load_some(bias + at, left)) : acc[m][v], left);
        }
}

// `rows` rows times the columns of one panel, tiles of MB rows at most and NV vectors.
template <class T, class Weight, int MB, int NV, class X>
static inline void panel_rows(const Weight* w, int64_t stride, const X* x, int64_t ldx, int64_t inputs, int64_t rows,
                              T* out, int64_t ldo, int64_t columns, const T* bias, int vectors) {
    constexpr int per_column = sizeof(Weight) == 2 ? 2 : 1;  // elements side by side
    for (int first = 0; first < vectors && first * W < columns; first += NV) {
        const Weight* part = w + first * W * per_column;
        int64_t m = 0;
        for (; m + MB <= rows; m += MB) {
            V acc[MB][NV] = {};
            tile<MB, NV>(part, stride, x + m * ldx, ldx, inputs, acc);
            emit<T, MB, NV>(acc, out + m * ldo + first * W, ldo, columns - (int64_t)first * W, bias ? bias + first * W : nullptr);
        }
        for (; m < rows; m++) {
            V acc[1][NV] = {};
            tile<1, NV>(part, stride, x + m * ldx, ldx, inputs, acc);
            emit<T, 1, NV>(acc, out + m * ldo + first * W, ldo, columns - (int64_t)first * W, bias ? bias + first * W : nullptr);
        }
    }
}

}  // namespace quire
