// y = x · weightᵀ with the weight in codes and x, in bf16, as whole numbers of 8 bits, a span of 32 inputs to a scale: of a
// number about 1/254 of the largest is lost, more than bfloat16 loses, so this is for those who ask for it.
#include "rounded.h"

namespace quire {
namespace {

static inline I quad_at(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return set1_int(four);
}

// Codes as they are multiplied. `add`: c + their products with x, by fours; those of 4 bits as `add_byte_products`.
template <int BITS>
struct Times {
    I codes;
    void set(I bytes) { codes = bytes; }
    I add(I c, I x) const {
        if (BITS == 4 || FOURS_AT_ONCE) return add_byte_products(c, codes, x);
        return add_int(c, whole_sums(add_byte_products(zero_int(), codes, x)));  // three of 63 · 127 · 2 would pass 2^15
    }
};
template <>
struct Times<8> {
    Factors codes;
    void set(I bytes) { codes = factors(bytes); }
    I add(I c, I x) const { return add_code_products(c, codes, x); }
};

struct Bytes {
    template <int BITS>
    static constexpr bool FETCHED = BITS == 4;
    template <int BITS>
    static constexpr bool FOUR_WIDE = true;
    using Number = int8_t;
    static constexpr float LARGEST = 127.0f;
    static constexpr int64_t SPAN = 32;  // of codes of 4 bits eight products of pairs, 15 · 127 · 2 · 8 < 2^15
    template <int BITS>
    static constexpr float TAKEN_OFF = BITS == 8 ? quire::TAKEN_OFF : 0.0f;
    template <int BITS>
    static constexpr bool SUMMED = BITS != 4 || FOURS_AT_ONCE;
    template <int BITS>
    static I whole(I sums) { return BITS == 4 ? whole_sums(sums) : sums; }
    static void store(int8_t* to, V values, int64_t n) { store_some(to, values, n); }

    template <int BITS, int MB, int NV>
    static inline void add_word(const uint8_t* word, const int8_t* x, int64_t ldx, I sums[MB][NV]) {
        constexpr int ABREAST = abreast<BITS, MB, NV>();
        for (int first = 0; first < NV; first += ABREAST) {
            Word<BITS> words[ABREAST];
            for (int v = 0; v < ABREAST; v++) words[v] = Word<BITS>(word + Word<BITS>::place((first + v) * W));
            for (int f = 0; f < Word<BITS>::FOURS; f++) {
                Times<BITS> codes[ABREAST];
                for (int v = 0; v < ABREAST; v++) codes[v].set(words[v].four(f));
                for (int m = 0; m < MB; m++) {
                    I four = quad_at(x + m * ldx + 4 * f);
                    for (int v = 0; v < ABREAST; v++) sums[m][first + v] = codes[v].add(sums[m][first + v], four);
                }
            }
        }
    }
};

template <int BITS, class Scale>
void many_rows(const Part<Bytes>& p, int64_t count, Scratch&) {
    by_columns<Bytes, BITS, Scale, TILE_ROWS, 2>(p, count);
}

}  // namespace
}  // namespace quire

using namespace quire;

extern "C" void quire_codes_linear_a8_bf16(Pool* pool, const void* fields, const bf16* bias, const bf16* x, int64_t ldx,
                                           bf16* out, int64_t rows) {
    std::lock_guard<std::mutex> hold(pool->lock());
    const Codes& c = *(const Codes*)fields;
    if (rows == 0) return;
    by_form(c, [&](auto bits, auto scale) {
        multiply<Bytes, bits.value, decltype(scale)>(*pool, c, bias, x, ldx, out, rows, many_rows<bits.value, decltype(scale)>);
    });
}
QUIRE_RECORDED(quire_codes_linear_a8_bf16)
