// Weights in codes: W[n, k] = (code - zero) · scale, a scale and a zero for each group of inputs.
//
// Codes lie in panels of 64 outputs, word after word of their inputs; each group is padded to whole words:
//   4 bits  [K / 8][64][4 bytes]         byte b has input b and, in its upper half, input 4 + b
//   6 bits  [K / 16][4][3][16][4 bytes]  byte b of part p has input 4p + 4 + b, and above it two bits of input b, from 2p on
//   8 bits  [K / 4][64][4 bytes]         byte b has input b
#pragma once
#include <algorithm>
#include <type_traits>

#include "pool.h"
#include "tile.h"

namespace quire {

constexpr int word_inputs(int64_t bits) { return bits == 4 ? 8 : bits == 6 ? 16 : 4; }

// Fields as in `native.py`.
struct Codes {
    const uint8_t* codes;
    const void* scales;  // [panel][G][64], half or float
    const float* zeros;  // the same, or null: all are `middle`
    int64_t outputs, inputs, bits, group, half_scales;
    float middle;

    int64_t groups() const { return (inputs + group - 1) / group; }
    int64_t per_word() const { return word_inputs(bits); }
    int64_t padded_group() const { return (group + per_word() - 1) / per_word() * per_word(); }
    int64_t depth() const { return groups() * padded_group(); }
    int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
};

// The words of W columns, as vectors of bytes that end in the code of an input each; what stands above belongs to others.
template <int BITS>
struct Word {
    static constexpr int INPUTS = word_inputs(BITS), FOURS = INPUTS / 4, PARTS = INPUTS * BITS / 32;
    static constexpr int NEAR = 64;                  // bytes from part to part: 16 columns'
    static constexpr int BYTES = PARTS * PANEL * 4;  // of the words of a panel
    static constexpr int MASK = (1 << BITS) - 1;
    I fours[BITS == 4 ? 1 : FOURS];

    // Where the word of a column begins.
    static constexpr int64_t place(int64_t column) { return column / 16 * PARTS * NEAR + column % 16 * 4; }

    Word() = default;
    explicit Word(const uint8_t* p) {
        for (int part = 0; part < PARTS; part++) fours[BITS == 6 ? part + 1 : part] = load_int(p + part * NEAR);
        if constexpr (BITS == 6)  // the first, which is used up before the others are needed
            fours[0] = merged(0x0f, merged(0x03, lowered<6>(fours[1]), lowered<4>(fours[2])), lowered<2>(fours[3]));
    }
    V input(int i) const { return field(of(i / 4), shift(i / 4) + 8 * (i % 4), MASK); }
    // Two inputs as numbers of 16 bits: those that stand at 2i and 2i + 1 in the order of `store_some`.
    I pair(int i) const { return field_of16(of(i / 2), shift(i / 2) + 8 * (i % 2), MASK); }
    // Four inputs as bytes.
    I four(int f) const { return field_of8(shift(f) ? lowered<4>(of(f)) : of(f), MASK); }

private:
    I of(int f) const { return fours[BITS == 4 ? 0 : f]; }
    static constexpr int shift(int f) { return BITS == 4 ? 4 * f : 0; }
};

// Some columns of a panel, from `column` on.
template <int BITS, class Scale>
struct Columns {
    static constexpr int WORD = Word<BITS>::INPUTS;
    const uint8_t* codes;
    const Scale* scales;
    const float* zeros;
    float middle;
    int64_t groups, words;  // words of a group

    Columns(const Codes& c, int64_t panel, int64_t column)
        : codes(c.codes + panel * c.depth() / WORD * Word<BITS>::BYTES + Word<BITS>::place(column)),
          scales((const Scale*)c.scales + panel * c.groups() * PANEL + column),
          zeros(c.zeros ? c.zeros + panel * c.groups() * PANEL + column : nullptr),
          middle(c.middle),
          groups(c.groups()),
          words(c.padded_group() / WORD) {}

    V scale(int64_t g, int v) const { return load(scales + g * PANEL + v * W); }
    V zero_of(int64_t g, int v) const { return zeros ? load(zeros + g * PANEL + v * W) : set1(middle); }
    const uint8_t* word(int64_t g, int64_t w, int v) const {
        return codes + (g * words + w) * Word<BITS>::BYTES + Word<BITS>::place(v * W);
    }
};

// Calls `with` with the number of bits and the type of scales that the codes have: std::integral_constant, and a scale.
template <class With>
void by_form(const Codes& c, const With& with) {
    auto by_scales = [&](auto bits) { c.half_scales ? with(bits, half()) : with(bits, float()); };
    if (c.bits == 4) return by_scales(std::integral_constant<int, 4>());
    if (c.bits == 6) return by_scales(std::integral_constant<int, 6>());
    by_scales(std::integral_constant<int, 8>());
}

}  // namespace quire
