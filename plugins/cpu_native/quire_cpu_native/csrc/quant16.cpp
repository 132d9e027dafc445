// y = x · weightᵀ with the weight in codes: for x in bf16, as whole numbers of 16 bits. Of a number 2^-15 of the largest
// in its span is lost: far less than it has lost already.
#include "rounded.h"

namespace quire {
namespace {

constexpr int MANY = 5;  // rows of a tile: as many as AVX2's registers hold sums

static inline I pair_at(const int16_t* x) {
    int32_t both;
    memcpy(&both, x, 4);
    return set1_int(both);
}

struct Halves {
    template <int BITS>
    static constexpr bool FETCHED = BITS != 8;
    template <int BITS>
    static constexpr bool FOUR_WIDE = BITS != 6;
    using Number = int16_t;
    static constexpr float LARGEST = 32767.0f;
    static constexpr int64_t SPAN = 256;  // 255 · 32767 · 256 < 2^31
    template <int BITS>
    static constexpr float TAKEN_OFF = 0.0f;
    template <int BITS>
    static constexpr bool SUMMED = true;
    template <int BITS>
    static I whole(I sums) { return sums; }
    static void store(int16_t* to, V values, int64_t n) { store_some(to, values, n); }

    template <int BITS, int MB, int NV>
    static inline void add_word(const uint8_t* word, const int16_t* x, int64_t ldx, I sums[MB][NV]) {
        constexpr int ABREAST = abreast<BITS, MB, NV>();
        for (int first = 0; first < NV; first += ABREAST) {
            Word<BITS> words[ABREAST];
            for (int v = 0; v < ABREAST; v++) words[v] = Word<BITS>(word + Word<BITS>::place((first + v) * W));
            for (int i = 0; i < Word<BITS>::INPUTS / 2; i++) {
                I both[MB];
                for (int m = 0; m < MB; m++) both[m] = pair_at(x + m * ldx + 2 * i);
                for (int v = 0; v < ABREAST; v++) {
                    I code = words[v].pair(i);
                    for (int m = 0; m < MB; m++) sums[m][first + v] = add_products(sums[m][first + v], code, both[m]);
                }
            }
        }
    }
};

// Two vectors of columns of a panel, their codes as numbers of 16 bits: [depth / 2][2 vectors][W][2 inputs]. Where all
// zeros are in the middle they are taken off already.
template <int BITS>
struct Wide {
    static constexpr bool CENTRED = true;
    const int16_t* codes;

    template <class Scale>
    Wide(const Columns<BITS, Scale>& c, int16_t* to) : codes(to) {
        I middle = set1_int(c.zeros ? 0 : (int32_t)c.middle * 0x00010001);
        for (int64_t w = 0; w < c.groups * c.words; w++)
            for (int v = 0; v < 2; v++) {
                Word<BITS> word(c.word(0, w, v));
                for (int i = 0; i < c.WORD / 2; i++) {
                    I code = sub_of16(word.pair(i), middle);
                    memcpy(to + ((w * c.WORD / 2 + i) * 2 + v) * 2 * W, &code, sizeof code);
                }
            }
    }

    template <int MB, int NV>
    void add_words(const int16_t* x, int64_t ldx, int64_t begin, int64_t end, I sums[MB][NV]) const {
        static_assert(NV == 2);
        constexpr int PAIRS = Word<BITS>::INPUTS / 2;
        I own[MB][NV];  // in registers: the compiler would write what it was given at every step
        for (int m = 0; m < MB; m++)
            for (int v = 0; v < NV; v++) own[m][v] = sums[m][v];
        for (int64_t k = begin * PAIRS; k < end * PAIRS; k++) {
            I first = load_int(codes + 4 * k * W), second = load_int(codes + (4 * k + 2) * W);
#if defined(__GNUC__)
#pragma GCC unroll 8
#endif
            for (int m = 0; m < MB; m++) {
                I both = pair_at(x + m * ldx + 2 * k);
                own[m][0] = add_products(own[m][0], first, both);
                own[m][1] = add_products(own[m][1], second, both);
            }
        }
        for (int m = 0; m < MB; m++)
            for (int v = 0; v < NV; v++) sums[m][v] = own[m][v];
    }
};

// Codes are unpacked once for all rows.
template <int BITS, class Scale>
void by_wide_codes(const Part<Halves>& p, int64_t count, Scratch& scratch) {
    int16_t* to = (int16_t*)scratch.floats(p.codes.depth() * W);
    int64_t columns = std::min<int64_t>(PANEL, p.codes.outputs - p.panel * PANEL);
    for (int64_t first = 0; first < columns; first += 2 * W) {
        Columns<BITS, Scale> c(p.codes, p.panel, first);
        Wide<BITS> wide(c, to);
        Ahead ahead(p.codes, p.panel, 1);
        ahead.stop();  // `wide` has read all
        by_tiles<MANY>(count, [&](auto rows, int64_t m) {
            V acc[rows.value][2] = {};
            tile<Halves, BITS, rows.value, 2>(c, wide, p.spans, p.x, p.row + m, 0, c.groups, ahead, acc);
            p.emit_at<rows.value, 2>(acc, p.row + m, first);
        });
    }
}

// With registers for the sums of so many columns, unpacking again costs less than reading what was unpacked.
template <int BITS, class Scale>
void many_rows(const Part<Halves>& p, int64_t count, Scratch& scratch) {
    if constexpr (W == 16)
        by_columns<Halves, BITS, Scale, TILE_ROWS, 2>(p, count);
    else
        by_wide_codes<BITS, Scale>(p, count, scratch);
}

}  // namespace
}  // namespace quire

using namespace quire;

extern "C" void quire_codes_linear_bf16(Pool* pool, const void* fields, const bf16* bias, const bf16* x, int64_t ldx,
                                        bf16* out, int64_t rows) {
    std::lock_guard<std::mutex> hold(pool->lock());
    const Codes& c = *(const Codes*)fields;
    if (rows == 0) return;
    by_form(c, [&](auto bits, auto scale) {
        multiply<Halves, bits.value, decltype(scale)>(*pool, c, bias, x, ldx, out, rows, many_rows<bits.value, decltype(scale)>);
    });
}
QUIRE_RECORDED(quire_codes_linear_bf16)
