// y = x · weightᵀ + bias. Weights are packed in panels of 64 outputs: float [K][64], bf16 [K / 2][64][2].
#include <algorithm>

#include "pool.h"
#include "recorded.h"
#include "tile.h"

namespace quire {
namespace {

constexpr int64_t FEW = 64;  // rows up to which weights are widened in registers, and read in pieces
constexpr int64_t FEW_IN_PAIRS = 8;  // the same where nothing is widened: up to which reading the weights is what takes time

int64_t packed_inputs(int64_t inputs, bool pairs) { return pairs ? (inputs + 1) / 2 * 2 : inputs; }

template <class T>
void pack(Pool& pool, const T* weight, T* packed, int64_t outputs, int64_t inputs) {
    constexpr int together = sizeof(T) == 2 ? 2 : 1;
    int64_t depth = packed_inputs(inputs, together == 2);
    pool.run((outputs + PANEL - 1) / PANEL, [=](int64_t panel, Scratch&) {
        T* to = packed + panel * depth * PANEL;
        for (int64_t column = 0; column < PANEL; column++) {
            int64_t row = panel * PANEL + column;
            for (int64_t k = 0; k < depth; k++)
                to[(k / together) * PANEL * together + column * together + k % together] =
                    row < outputs && k < inputs ? weight[row * inputs + k] : T(0);
        }
    });
}

// x as floats, its rows side by side; where it is that already, as it is.
const float* widen(Pool&, const float* x, int64_t&, int64_t, int64_t) { return x; }
const float* widen(Pool& pool, const bf16* x, int64_t& ldx, int64_t rows, int64_t inputs) {
    float* wide = pool.shared(rows * inputs);
    int64_t from = ldx, step = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, inputs));
    pool.run((rows + step - 1) / step, [=](int64_t part, Scratch&) {
        for (int64_t row = part * step; row < std::min(rows, (part + 1) * step); row++) {
            int64_t k = 0;
            for (; k + W <= inputs; k += W) store(wide + row * inputs + k, load(x + row * from + k));
            for (; k < inputs; k++) wide[row * inputs + k] = to_float(x[row * from + k]);
        }
    });
    ldx = inputs;
    return wide;
}

// As many columns at once as the registers hold.
template <class T, class X>
void few_rows(const T* w, const X* x, int64_t ldx, int64_t inputs, int64_t rows, T* out, int64_t ldo,
              int64_t columns, const T* bias) {
    constexpr int ALL = PANEL / W;
    constexpr int HALF = W == 16 ? ALL : ALL / 2, QUARTER = W == 16 ? ALL : ALL / 4;
    if (rows == 1) return panel_in_pieces<T, T, 1, ALL, 1>(w, x, ldx, inputs, rows, out, ldo, columns, bias);
    if (rows == 2) return panel_in_pieces<T, T, 2, HALF, 2>(w, x, ldx, inputs, rows, out, ldo, columns, bias);
    panel_in_pieces<T, T, 6, QUARTER, FEW>(w, x, ldx, inputs, rows, out, ldo, columns, bias);
}

// [inputs][2 * W] floats of some columns of a panel
void expand(const float* w, float* to, int64_t inputs) {
    for (int64_t k = 0; k < inputs; k++)
        for (int v = 0; v < 2; v++) store(to + (2 * k + v) * W, load(w + k * PANEL + v * W));
}
void expand(const bf16* w, float* to, int64_t inputs) {
    for (int64_t k = 0; k < packed_inputs(inputs, true); k += 2)
        for (int v = 0; v < 2; v++) {
            store(to + (2 * k + v) * W, first_of_pairs(w + k * PANEL + 2 * v * W));
            store(to + (2 * k + 2 + v) * W, second_of_pairs(w + k * PANEL + 2 * v * W));
        }
}

// Two vectors of columns are widened once, for all rows, and all of their inputs stay near.
template <class T>
void many_rows(const T* w, const float* x, int64_t ldx, int64_t inputs, int64_t rows, T* out, int64_t ldo,
               int64_t columns, const T* bias, Scratch& scratch) {
    constexpr int together = sizeof(T) == 2 ? 2 : 1;
    float* wide = scratch.floats((inputs + 1) * 2 * W);
    for (int first = 0; first < PANEL / W && first * W < columns; first += 2) {
        int64_t left = std::min<int64_t>(columns - first * W, 2 * W);
        expand(w + first * W * together, wide, inputs);
        const T* part = bias ? bias + first * W : nullptr;
        panel_rows<T, float, 6, 2>(wide, 2 * W, x, ldx, inputs, rows, out + first * W, ldo, left, part, 2);
    }
}

// What tiles multiply by: floats, or pairs of bf16 where the processor has an instruction for them.
template <class T>
const float* operand(Pool& pool, const T* x, int64_t& ldx, int64_t rows, int64_t inputs) {
    return widen(pool, x, ldx, rows, inputs);
}
#if defined(QUIRE_ISA_AVX512BF16)
const bf16* operand(Pool& pool, const bf16* x, int64_t& ldx, int64_t rows, int64_t inputs) {
    if (inputs % 2 == 0) return x;
    bf16* even = (bf16*)pool.shared((rows * (inputs + 1) + 1) / 2);
    for (int64_t row = 0; row < rows; row++) {
        memcpy(even + row * (inputs + 1), x + row * ldx, inputs * sizeof(bf16));
        even[row * (inputs + 1) + inputs] = 0;
    }
    ldx = inputs + 1;
    return even;
}
// Nothing is to be widened. Weights are near already when the next rows have their turn: longer pieces, fewer rows.
void many_rows(const bf16* w, const bf16* x, int64_t ldx, int64_t inputs, int64_t rows, bf16* out, int64_t ldo,
               int64_t columns, const bf16* bias, Scratch&) {
    constexpr int SOME = 48;
    for (int64_t row = 0, some; row < rows; row += some) {
        some = even_share(rows - row, SOME);
        panel_in_pieces<bf16, bf16, 6, PANEL / W, SOME, 256>(w, x + row * ldx, ldx, inputs, some, out + row * ldo, ldo,
                                                             columns, bias);
    }
}
#endif

template <class T>
void multiply(Pool& pool, const T* packed, const T* bias, const T* x, int64_t ldx, T* out, int64_t rows,
              int64_t outputs, int64_t inputs) {
    if (rows == 0) return;
    auto wide = operand(pool, x, ldx, rows, inputs);
    int64_t panels = (outputs + PANEL - 1) / PANEL, depth = packed_inputs(inputs, sizeof(T) == 2);
    int64_t used = sizeof(*wide) == 2 ? depth : inputs;
    // Rows are shared out as well where there are too few panels to keep every thread busy.
    int64_t parts = std::min<int64_t>(std::max<int64_t>(1, 4 * pool.threads() / panels), (rows + 23) / 24);
    int64_t step = (rows + parts - 1) / parts;
    pool.run(panels * parts, [=](int64_t task, Scratch& scratch) {
        int64_t column = task / parts * PANEL, first = task % parts * step, count = std::min(step, rows - first);
        if (count <= 0) return;
        const T* w = packed + column * depth;
        const T* part = bias ? bias + column : nullptr;
        T* to = out + first * outputs + column;
        if (count <= (sizeof(*wide) == 2 ? FEW_IN_PAIRS : FEW))
            few_rows(w, wide + first * ldx, ldx, used, count, to, outputs, outputs - column, part);
        else
            many_rows(w, wide + first * ldx, ldx, used, count, to, outputs, outputs - column, part, scratch);
    });
}

}  // namespace
}  // namespace quire

using namespace quire;

extern "C" {

void quire_linear_pack_bf16(Pool* pool, const bf16* weight, bf16* packed, int64_t outputs, int64_t inputs) {
    std::lock_guard<std::mutex> hold(pool->lock());
    pack(*pool, weight, packed, outputs, inputs);
}
void quire_linear_pack_f32(Pool* pool, const float* weight, float* packed, int64_t outputs, int64_t inputs) {
    std::lock_guard<std::mutex> hold(pool->lock());
    pack(*pool, weight, packed, outputs, inputs);
}
// x: rows `ldx` apart. bias may be null.
void quire_linear_bf16(Pool* pool, const bf16* packed, const bf16* bias, const bf16* x, int64_t ldx, bf16* out,
                       int64_t rows, int64_t outputs, int64_t inputs) {
    std::lock_guard<std::mutex> hold(pool->lock());
    multiply(*pool, packed, bias, x, ldx, out, rows, outputs, inputs);
}
void quire_linear_f32(Pool* pool, const float* packed, const float* bias, const float* x, int64_t ldx, float* out,
                      int64_t rows, int64_t outputs, int64_t inputs) {
    std::lock_guard<std::mutex> hold(pool->lock());
    multiply(*pool, packed, bias, x, ldx, out, rows, outputs, inputs);
}
}
QUIRE_RECORDED(quire_linear_pack_bf16)
QUIRE_RECORDED(quire_linear_pack_f32)
QUIRE_RECORDED(quire_linear_bf16)
QUIRE_RECORDED(quire_linear_f32)
