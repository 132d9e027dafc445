// Output tiles in registers: MB rows of x times NV vectors of columns. Each output is one chain of additions over the
// inputs in their order, whatever the tile, so that a row's bits do not depend on how many rows there are.
#pragma once
#include <type_traits>

#include "simd.h"

namespace quire {

constexpr int PANEL = 64;  // output columns that are packed together
constexpr int DEPTH = 64;  // inputs after which the next columns of a panel have their turn
constexpr int AHEAD = 2 * DEPTH;  // inputs by which weights are fetched early

// Adds value(m) · column(v) to every sum of a tile, holding the fewer of the two in registers beside the sums.
template <int MB, int NV, class Value, class Column>
static inline void add_outer(V acc[MB][NV], const Value& value, const Column& column) {
    if constexpr (MB < NV) {
        V held[MB];
        for (int m = 0; m < MB; m++) held[m] = value(m);
        for (int v = 0; v < NV; v++) {
            V one = column(v);
            for (int m = 0; m < MB; m++) acc[m][v] = fma(held[m], one, acc[m][v]);
        }
    } else {
        V held[NV];
        for (int v = 0; v < NV; v++) held[v] = column(v);
        for (int m = 0; m < MB; m++) {
            V one = value(m);
            for (int v = 0; v < NV; v++) acc[m][v] = fma(one, held[v], acc[m][v]);
        }
    }
}

// Which of the `passes` over the same weights a tile is, and how many elements of a panel later the next ones lie. Each
// pass fetches its share of them.
struct Pass {
    int64_t number = 0, passes = 1, later = 0;
};

// w: float, rows of inputs `stride` apart.
template <int MB, int NV>
static inline void tile(const float* w, int64_t stride, const float* x, int64_t ldx, int64_t inputs, V acc[MB][NV],
                        const Pass& = {}) {
    for (int64_t k = 0; k < inputs; k++)
        add_outer<MB, NV>(
            acc, [&](int m) { return set1(x[m * ldx + k]); }, [&](int v) { return load(w + k * stride + v * W); });
}

// w: bf16 in pairs of inputs, [inputs / 2][PANEL][2]; the last pair is padded with zeros.
template <int MB, int NV>
static inline void tile(const bf16* w, int64_t stride, const float* x, int64_t ldx, int64_t inputs, V acc[MB][NV],
                        const Pass& = {}) {
    for (int64_t k = 0; k < inputs; k += 2) {
        const bf16* pair = w + k * stride;
#if defined(__GNUC__)
        for (int v = 0; v < NV; v += 64 / (4 * W)) __builtin_prefetch(pair + 2 * v * W + AHEAD * PANEL);
#endif
        add_outer<MB, NV>(
            acc, [&](int m) { return set1(x[m * ldx + k]); }, [&](int v) { return first_of_pairs(pair + 2 * v * W); });
        if (k + 1 == inputs) return;
        add_outer<MB, NV>(
            acc, [&](int m) { return set1(x[m * ldx + k + 1]); },
            [&](int v) { return second_of_pairs(pair + 2 * v * W); });
    }
}

#if defined(QUIRE_ISA_AVX512BF16)
// The same with x in bf16: pairs of products are summed by one instruction. `inputs` is even.
template <int MB, int NV>
static inline void tile(const bf16* w, int64_t stride, const bf16* x, int64_t ldx, int64_t inputs, V acc[MB][NV],
                        const Pass& pass = {}) {
    constexpr int LINES = 2 * PANEL / 32;  // of 64 bytes, of a pair of inputs
    for (int64_t k = 0; k < inputs; k += 2) {
        const bf16* pair = w + k * stride;
        if (MB > 2 && pass.later)
            for (int64_t line = pass.number; line < LINES; line += pass.passes)
                fetch_later(w + k * PANEL + 32 * line + pass.later);
        __m512bh column[NV];
        for (int v = 0; v < NV; v++) {
            memcpy(&column[v], pair + 2 * v * W, sizeof column[v]);
            if (MB <= 2) fetch_soon(pair + 2 * v * W + 2048);
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

// Rows of the next tile where `left` rows are to be shared out evenly among tiles of at most `most`: small ones cost more.
static inline int64_t even_share(int64_t left, int64_t most) {
    int64_t tiles = (left + most - 1) / most;
    return (left + tiles - 1) / tiles;
}

// Calls `work` with a number of rows, 1 to MOST, that the compiler knows: std::integral_constant<int, rows>.
template <int MOST, class Work>
static inline void with_rows(int64_t rows, const Work& work) {
    if constexpr (MOST > 1) {
        if (rows < MOST) return with_rows<MOST - 1>(rows, work);
    }
    work(std::integral_constant<int, MOST>{});
}

// Calls `work` with the rows of each tile, as `with_rows` does, and the first of them: `rows` of them, MOST at most in one.
template <int MOST, class Work>
static inline void by_tiles(int64_t rows, const Work& work) {
    for (int64_t first = 0; first < rows;) {
        int64_t size = even_share(rows - first, MOST);
        with_rows<MOST>(size, [&](auto few) { work(few, first); });
        first += size;
    }
}

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

template <int MB, int NV>
static inline void copy(V (*to)[NV], const V (*from)[NV]) {
    for (int m = 0; m < MB; m++)
        for (int v = 0; v < NV; v++) to[m][v] = from[m][v];
}

// All columns of a panel, `rows` rows in tiles of MB at most; SUMS: rows that there may be. DEEP inputs at a time, so
// that all columns of a piece of memory are used while it is near, and the next comes in meanwhile.
template <class T, class Weight, int MB, int NV, int SUMS, int DEEP = DEPTH, class X>
static inline void panel_in_pieces(const Weight* w, const X* x, int64_t ldx, int64_t inputs, int64_t rows, T* out,
                                   int64_t ldo, int64_t columns, const T* bias) {
    constexpr int per_column = sizeof(Weight) == 2 ? 2 : 1, strips = PANEL / W / NV;
    V sums[strips][SUMS][NV];
    for (int s = 0; s < strips; s++)
        for (int64_t m = 0; m < rows; m++)
            for (int v = 0; v < NV; v++) sums[s][m][v] = zero();
    for (int64_t k = 0; k < inputs; k += DEEP) {
        int64_t depth = inputs - k < DEEP ? inputs - k : DEEP;
        int64_t passes = (rows + MB - 1) / MB * strips;
        Pass pass{0, passes, passes > 1 ? 2 * DEEP * PANEL : 0};
        for (int s = 0; s < strips; s++)
            by_tiles<MB>(rows, [&](auto few, int64_t m) {
                V acc[few.value][NV];
                copy<few.value, NV>(acc, sums[s] + m);
                tile<few.value, NV>(w + k * PANEL + s * NV * W * per_column, PANEL, x + m * ldx + k, ldx, depth, acc, pass);
                copy<few.value, NV>(sums[s] + m, acc);
                pass.number++;
            });
    }
    for (int s = 0; s < strips && s * NV * W < columns; s++)
        for (int64_t m = 0; m < rows; m++)
            emit<T, 1, NV>(&sums[s][m], out + m * ldo + s * NV * W, ldo, columns - s * NV * W,
                           bias ? bias + s * NV * W : nullptr);
}

// `rows` rows times the columns of one panel, tiles of MB rows at most and NV vectors.
template <class T, class Weight, int MB, int NV, class X>
static inline void panel_rows(const Weight* w, int64_t stride, const X* x, int64_t ldx, int64_t inputs, int64_t rows,
                              T* out, int64_t ldo, int64_t columns, const T* bias, int vectors) {
    constexpr int per_column = sizeof(Weight) == 2 ? 2 : 1;  // elements side by side
    for (int first = 0; first < vectors && first * W < columns; first += NV) {
        const Weight* part = w + first * W * per_column;
        const T* further = bias ? bias + first * W : nullptr;
        by_tiles<MB>(rows, [&](auto few, int64_t m) {
            V acc[few.value][NV] = {};
            tile<few.value, NV>(part, stride, x + m * ldx, ldx, inputs, acc);
            emit<T, few.value, NV>(acc, out + m * ldo + first * W, ldo, columns - (int64_t)first * W, further);
        });
    }
}

}  // namespace quire
