// y = x · weightᵀ with the weight in codes, which are widened to floats: for x in float.
#include <algorithm>

#include "codes.h"
#include "recorded.h"

namespace quire {
namespace {

// As for a weight in floats, which is made here in registers: the same bits.
template <int BITS, class Scale, int MB, int NV>
void tile(const Columns<BITS, Scale>& c, const float* x, int64_t ldx, V acc[MB][NV]) {
    for (int64_t g = 0; g < c.groups; g++)
        for (int64_t w = 0; w < c.words; w++) {
            const float* at = x + (g * c.words + w) * c.WORD;
            for (int v = 0; v < NV; v++) {
                V scale = c.scale(g, v), zero = c.zero_of(g, v);
                Word<BITS> word(c.word(g, w, v));
#if defined(__GNUC__)
#pragma GCC unroll 16
#endif
                for (int i = 0; i < c.WORD; i++) {
                    V weight = mul(sub(word.input(i), zero), scale);
                    for (int m = 0; m < MB; m++) acc[m][v] = fma(set1(at[m * ldx + i]), weight, acc[m][v]);
                }
            }
        }
}

// [depth][2 * W] floats of two vectors of columns.
template <int BITS, class Scale>
void expand(const Columns<BITS, Scale>& c, float* to) {
    for (int64_t g = 0; g < c.groups; g++)
        for (int v = 0; v < 2; v++) {
            V scale = c.scale(g, v), zero = c.zero_of(g, v);
            for (int64_t w = 0; w < c.words; w++) {
                Word<BITS> word(c.word(g, w, v));
                float* at = to + (g * c.words + w) * c.WORD * 2 * W + v * W;
                for (int i = 0; i < c.WORD; i++) store(at + i * 2 * W, mul(sub(word.input(i), zero), scale));
            }
        }
}

// x in floats [rows][depth], zeros where groups are padded; in place where it is that already.
template <class T>
const float* arrange(Pool& pool, const Codes& c, const T* x, int64_t& ldx, int64_t rows) {
    if (sizeof(T) == 4 && c.depth() == c.inputs) return (const float*)x;
    int64_t depth = c.depth(), padded = c.padded_group(), from = ldx;
    float* wide = pool.shared(rows * depth);
    pool.run((rows + 7) / 8, [=, &c](int64_t task, Scratch&) {
        for (int64_t row = task * 8; row < std::min(rows, task * 8 + 8); row++)
            for (int64_t g = 0; g < c.groups(); g++) {
                const T* in = x + row * from + g * c.group;
                float* to = wide + row * depth + g * padded;
                int64_t count = std::min(c.group, c.inputs - g * c.group), k = 0;
                for (; k + W <= count; k += W) store(to + k, load(in + k));
                for (; k < padded; k++) to[k] = k < count ? to_float(in[k]) : 0.0f;
            }
    });
    ldx = depth;
    return wide;
}

template <class T, int BITS, class Scale, int MB, int NV>
void few_rows(const Codes& c, int64_t panel, const float* x, int64_t ldx, T* out, const T* bias) {
    int64_t columns = std::min<int64_t>(PANEL, c.outputs - panel * PANEL);
    for (int first = 0; first < PANEL / W && first * W < columns; first += NV) {
        V acc[MB][NV] = {};
        tile<BITS, Scale, MB, NV>(Columns<BITS, Scale>(c, panel, first * W), x, ldx, acc);
        emit<T, MB, NV>(acc, out + first * W, c.outputs, columns - first * W, bias ? bias + first * W : nullptr);
    }
}

template <class T, int BITS, class Scale>
void many_rows(const Codes& c, int64_t panel, const float* x, int64_t ldx, int64_t rows, T* out, const T* bias,
               Scratch& scratch) {
    float* wide = scratch.floats(c.depth() * 2 * W);
    int64_t columns = std::min<int64_t>(PANEL, c.outputs - panel * PANEL);
    for (int first = 0; first < PANEL / W && first * W < columns; first += 2) {
        expand(Columns<BITS, Scale>(c, panel, first * W), wide);
        int64_t left = std::min<int64_t>(columns - first * W, 2 * W);
        const T* part = bias ? bias + first * W : nullptr;
        panel_rows<T, float, 6, 2>(wide, 2 * W, x, ldx, c.depth(), rows, out + first * W, c.outputs, left, part, 2);
    }
}

template <class T, int BITS, class Scale>
void multiply(Pool& pool, const Codes& c, const T* bias, const T* x, int64_t ldx, T* out, int64_t rows) {
    const float* wide = arrange(pool, c, x, ldx, rows);
    int64_t parts = std::min<int64_t>(std::max<int64_t>(1, 4 * pool.threads() / c.panels()), (rows + 23) / 24);
    int64_t step = (rows + parts - 1) / parts;
    pool.run(c.panels() * parts, [=, &c](int64_t task, Scratch& scratch) {
        int64_t panel = task / parts, first = task % parts * step, count = std::min(step, rows - first);
        const float* from = wide + first * ldx;
        T* to = out + first * c.outputs + panel * PANEL;
        const T* part = bias ? bias + panel * PANEL : nullptr;
        constexpr int FEW_COLUMNS = W == 16 ? 4 : 2;
        if (count <= 0) return;
        if (count == 1) return few_rows<T, BITS, Scale, 1, 4>(c, panel, from, ldx, to, part);
        if (count == 2) return few_rows<T, BITS, Scale, 2, FEW_COLUMNS>(c, panel, from, ldx, to, part);
        if (count == 3) return few_rows<T, BITS, Scale, 3, FEW_COLUMNS>(c, panel, from, ldx, to, part);
        many_rows<T, BITS, Scale>(c, panel, from, ldx, count, to, part, scratch);
    });
}

// One word of a column from `count` codes; what it lacks is zero. Four codes at a time, in the bytes of a number.
template <int BITS>
static inline void pack_word(const uint8_t* codes, int64_t count, uint8_t* to) {
    uint32_t fours[Word<BITS>::FOURS] = {};
    for (int i = 0; i < Word<BITS>::INPUTS; i++)
        if (i < count) fours[i / 4] |= (uint32_t)codes[i] << 8 * (i % 4);
    for (int part = 0; part < Word<BITS>::PARTS; part++) {
        uint32_t bits = fours[BITS == 6 ? part + 1 : part];
        if constexpr (BITS == 4) bits |= fours[1] << 4;
        if constexpr (BITS == 6) bits |= (fours[0] >> 2 * part & 0x03030303) << 6;
        memcpy(to + part * Word<BITS>::NEAR, &bits, 4);
    }
}

// codes [N][K], one to a byte -> panels, a group of all columns at a time.
template <int BITS>
void pack(Pool& pool, const Codes& c, const uint8_t* codes, uint8_t* packed) {
    constexpr int64_t WORD = Word<BITS>::INPUTS;
    int64_t words = c.padded_group() / WORD;
    pool.run(c.panels(), [=, &c](int64_t panel, Scratch&) {
        for (int64_t g = 0; g < c.groups(); g++)
            for (int64_t column = 0; column < PANEL; column++) {
                int64_t row = panel * PANEL + column;
                int64_t count = row < c.outputs ? std::min(c.group, c.inputs - g * c.group) : 0;
                const uint8_t* from = codes + row * c.inputs + g * c.group;
                uint8_t* to = packed + (panel * c.groups() + g) * words * Word<BITS>::BYTES + Word<BITS>::place(column);
                for (int64_t w = 0; w < words; w++, from += WORD, to += Word<BITS>::BYTES)
                    if (int64_t left = count - w * WORD; left >= WORD)
                        pack_word<BITS>(from, WORD, to);
                    else
                        pack_word<BITS>(from, left, to);
            }
    });
}

template <class Scale, int BITS>
void weights(Pool& pool, const Codes& c, float* out) {
    pool.run(c.panels(), [=, &c](int64_t panel, Scratch& scratch) {
        float* wide = scratch.floats(c.depth() * 2 * W);
        int64_t columns = std::min<int64_t>(PANEL, c.outputs - panel * PANEL), padded = c.padded_group();
        for (int64_t first = 0; first < columns; first += 2 * W) {
            expand(Columns<BITS, Scale>(c, panel, first), wide);
            for (int64_t column = 0; column < std::min<int64_t>(2 * W, columns - first); column++)
                for (int64_t k = 0; k < c.inputs; k++)
                    out[(panel * PANEL + first + column) * c.inputs + k] =
                        wide[(k / c.group * padded + k % c.group) * 2 * W + column];
        }
    });
}

}  // namespace
}  // namespace quire

using namespace quire;

extern "C" {

void quire_codes_pack(Pool* pool, const void* fields, const uint8_t* codes, uint8_t* packed) {
    std::lock_guard<std::mutex> hold(pool->lock());
    const Codes& c = *(const Codes*)fields;
    by_form(c, [&](auto bits, auto) { pack<bits.value>(*pool, c, codes, packed); });
}
// float [N][K]
void quire_codes_weight(Pool* pool, const void* fields, float* out) {
    std::lock_guard<std::mutex> hold(pool->lock());
    const Codes& c = *(const Codes*)fields;
    by_form(c, [&](auto bits, auto scale) { weights<decltype(scale), bits.value>(*pool, c, out); });
}
void quire_codes_linear_f32(Pool* pool, const void* fields, const float* bias, const float* x, int64_t ldx, float* out,
                            int64_t rows) {
    std::lock_guard<std::mutex> hold(pool->lock());
    const Codes& c = *(const Codes*)fields;
    if (rows == 0) return;
    by_form(c, [&](auto bits, auto scale) {
        multiply<float, bits.value, decltype(scale)>(*pool, c, bias, x, ldx, out, rows);
    });
}
}
QUIRE_RECORDED(quire_codes_pack)
QUIRE_RECORDED(quire_codes_weight)
QUIRE_RECORDED(quire_codes_linear_f32)
