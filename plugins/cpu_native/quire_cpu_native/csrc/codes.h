// Weights in codes: W[n, k] = (code - zero) · scale, a scale and a zero for each group of inputs.
//
// Codes lie in panels of 64 outputs, [K / 8][64][4 bytes] of 4 bits or [K / 4][64][4] of 8: four bytes hold a column's
// next inputs, 4-bit codes of inputs i and i + 4 in one byte. Each group is padded to whole such words.
#pragma once
#include <algorithm>

#include "pool.h"
#include "tile.h"

namespace quire {

// Fields as in `native.py`.
struct Codes {
    const uint8_t* codes;
    const void* scales;  // [panel][G][64], half or float
    const float* zeros;  // the same, or null: all are `middle`
    int64_t outputs, inputs, bits, group, half_scales;
    float middle;

    int64_t groups() const { return (inputs + group - 1) / group; }
    int64_t per_word() const { return 32 / bits; }
    int64_t padded_group() const { return (group + per_word() - 1) / per_word() * per_word(); }
    int64_t depth() const { return groups() * padded_group(); }
    int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
};

// Where input i of a word lies: shift of its bits.
template <int BITS>
constexpr int shift_of(int i) { return BITS == 4 ? 8 * (i % 4) + 4 * (i / 4) : 8 * i; }
template <int BITS>
static inline V field(I x, int shift) { return BITS == 4 ? field4(x, shift) : field8(x, shift); }

// Some columns of a panel, from `column` on.
template <int BITS, class Scale>
struct Columns {
    static constexpr int WORD = 32 / BITS;
    const uint8_t* codes;
    const Scale* scales;
    const float* zeros;
    float middle;
    int64_t groups, words;  // words of a group

    Columns(const Codes& c, int64_t panel, int64_t column)
        : codes(c.codes + (panel * c.depth() / WORD * PANEL + column) * 4),
          scales((const Scale*)c.scales + panel * c.groups() * PANEL + column),
          zeros(c.zeros ? c.zeros + panel * c.groups() * PANEL + column : nullptr),
          middle(c.middle),
          groups(c.groups()),
          words(c.padded_group() / WORD) {}

    V scale(int64_t g, int v) const { return load(scales + g * PANEL + v * W); }
    V zero_of(int64_t g, int v) const { return zeros ? load(zeros + g * PANEL + v * W) : set1(middle); }
    const uint8_t* word(int64_t g, int64_t w, int v) const { return codes + ((g * words + w) * PANEL + v * W) * 4; }
};

}  // namespace quire
