// y = x · weightᵀ with the weight in codes and x, in bf16, as whole numbers of 8 bits.
//
// Each row of x is scaled by its own largest value in spans of 32 inputs of a group, about 1/254 of which is lost: more
// than bfloat16 loses, so this is for those who ask for it. A span's sum is exact, whatever its order: of codes of 4
// bits, eight products of pairs, 15 · 127 · 2 · 8 < 2^15; of 8 bits, see `add_code_products`.
#include <cmath>

#include "codes.h"
#include "recorded.h"

namespace quire {
namespace {

constexpr int64_t SPAN = 32;

// x as whole numbers, with a scale and a sum for each span: [rows][depth], [rows][groups · spans].
struct Rows {
    int8_t* values;
    float *scales, *sums;
    int64_t depth, spans;  // spans of a group
};

void round_span(const bf16* x, int64_t count, int8_t* to, int64_t padded, float& scale, float& total) {
    float wide[SPAN] = {}, largest = 0.0f, sum = 0.0f;
    for (int64_t k = 0; k < count; k++) {
        wide[k] = to_float(x[k]);
        float size = fabsf(wide[k]);
        if (size > largest || size != size) largest = size;
    }
    bool usable = largest > 1e-30f && largest < INFINITY;
    scale = usable ? largest / 127.0f : largest;  // not a number, or infinite: so is the result
    V inverse = set1(usable ? 127.0f / largest : 0.0f);
    for (int64_t k = 0; usable && k < SPAN; k += W) store(wide + k, round_to_even(mul(load(wide + k), inverse)));
    for (int64_t k = 0; k < padded; k++) {
        to[k] = usable ? (int8_t)wide[k] : (int8_t)0;
        sum += (float)to[k];
    }
    total = sum;
}

Rows round_rows(Pool& pool, const Codes& c, const bf16* x, int64_t ldx, int64_t rows) {
    int64_t padded = c.padded_group(), spans = (padded + SPAN - 1) / SPAN, all = c.groups() * spans;
    Rows out{nullptr, nullptr, nullptr, c.depth(), spans};
    out.values = (int8_t*)pool.shared((rows * out.depth + 3) / 4);
    out.scales = pool.shared2(2 * rows * all), out.sums = out.scales + rows * all;
    pool.run((rows + 3) / 4, [=, &c](int64_t task, Scratch&) {
        for (int64_t row = task * 4; row < std::min(rows, task * 4 + 4); row++)
            for (int64_t g = 0; g < c.groups(); g++)
                for (int64_t s = 0; s < spans; s++) {
                    int64_t begin = s * SPAN, input = g * c.group + begin, at = row * all + g * spans + s;
                    int64_t size = std::min(SPAN, padded - begin);
                    int64_t count = std::max<int64_t>(0, std::min({c.group - begin, c.inputs - input, size}));
                    round_span(x + row * ldx + input, count, out.values + row * out.depth + g * padded + begin, size,
                               out.scales[at], out.sums[at]);
                }
    });
    return out;
}

static inline I quad_at(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    return set1_int(four);
}

// Adds the products of a word's codes in each column with MB rows of x, its inputs at `x`, rows `ldx` apart.
template <int BITS, int MB>
static inline void add_word(I codes, const int8_t* x, int64_t ldx, I* sums, int stride) {
    if constexpr (BITS == 4) {
        I low = low_nibbles(codes), high = high_nibbles(codes);
        for (int m = 0; m < MB; m++) {
            sums[m * stride] = add_byte_products(sums[m * stride], low, quad_at(x + m * ldx));
            sums[m * stride] = add_byte_products(sums[m * stride], high, quad_at(x + m * ldx + 4));
        }
    } else {
        Factors all = factors(codes);
        for (int m = 0; m < MB; m++)
            sums[m * stride] = add_code_products(sums[m * stride], all, quad_at(x + m * ldx));
    }
}

template <int BITS, class Scale, int MB, int NV>
void tile(const Columns<BITS, Scale>& c, const Rows& x, int64_t row, V acc[MB][NV]) {
    constexpr int64_t WORD = 32 / BITS, SPAN_WORDS = SPAN / WORD;
    int64_t all = c.groups * x.spans;
    for (int64_t g = 0; g < c.groups; g++)
        for (int64_t s = 0; s < x.spans; s++) {
            I sums[MB][NV];
            for (int m = 0; m < MB; m++)
                for (int v = 0; v < NV; v++) sums[m][v] = zero_int();
            for (int64_t w = s * SPAN_WORDS; w < std::min(c.words, (s + 1) * SPAN_WORDS); w++) {
                const int8_t* at = x.values + row * x.depth + (g * c.words + w) * WORD;
                for (int v = 0; v < NV; v++) {
                    const uint8_t* place = c.word(g, w, v);
#if defined(__GNUC__)
                    if (MB <= 2) __builtin_prefetch(place + 4096);
#endif
                    add_word<BITS, MB>(load_int(place), at, x.depth, &sums[0][v], NV);
                }
            }
            for (int v = 0; v < NV; v++) {
                V weight_scale = c.scale(g, v), zero = c.zero_of(g, v);
                if (BITS == 8) zero = sub(zero, set1(TAKEN_OFF));
                for (int m = 0; m < MB; m++) {
                    int64_t at = (row + m) * all + g * x.spans + s;
                    I whole = BITS == 4 ? whole_sums(sums[m][v]) : sums[m][v];
                    V exact = sub(to_float(whole), mul(zero, set1(x.sums[at])));
                    acc[m][v] = fma(exact, mul(weight_scale, set1(x.scales[at])), acc[m][v]);
                }
            }
        }
}

template <int BITS, class Scale, int MB, int NV>
void strip(const Codes& c, int64_t panel, const Rows& x, int64_t row, bf16* out, const bf16* bias) {
    int64_t columns = std::min<int64_t>(PANEL, c.outputs - panel * PANEL);
    for (int first = 0; first < PANEL / W && first * W < columns; first += NV) {
        V acc[MB][NV] = {};
        tile<BITS, Scale, MB, NV>(Columns<BITS, Scale>(c, panel, first * W), x, row, acc);
        emit<bf16, MB, NV>(acc, out + first * W, c.outputs, columns - first * W, bias ? bias + first * W : nullptr);
    }
}

template <int BITS, class Scale>
void multiply(Pool& pool, const Codes& c, const bf16* bias, const bf16* x, int64_t ldx, bf16* out, int64_t rows) {
    Rows rounded = round_rows(pool, c, x, ldx, rows);
    int64_t parts = std::min<int64_t>(std::max<int64_t>(1, 4 * pool.threads() / c.panels()), (rows + 23) / 24);
    int64_t step = (rows + parts - 1) / parts;
    pool.run(c.panels() * parts, [=, &c, &rounded](int64_t task, Scratch&) {
        int64_t panel = task / parts, row = task % parts * step, end = std::min(rows, row + step);
        const bf16* part = bias ? bias + panel * PANEL : nullptr;
        constexpr int FEW = W == 16 ? 4 : 2;
        auto to = [&](int64_t r) { return out + r * c.outputs + panel * PANEL; };
        for (; row + 4 <= end; row += 4) strip<BITS, Scale, 4, FEW>(c, panel, rounded, row, to(row), part);
        for (; row + 2 <= end; row += 2) strip<BITS, Scale, 2, 4>(c, panel, rounded, row, to(row), part);
        for (; row < end; row++) strip<BITS, Scale, 1, 4>(c, panel, rounded, row, to(row), part);
    });
}

}  // namespace
}  // namespace quire

using namespace quire;

extern "C" void quire_codes_linear_a8_bf16(Pool* pool, const void* fields, const bf16* bias, const bf16* x, int64_t ldx,
                                           bf16* out, int64_t rows) {
    std::lock_guard<std::mutex> hold(pool->lock());
    const Codes& c = *(const Codes*)fields;
    if (rows == 0) return;
    if (c.bits == 4)
        c.half_scales ? multiply<4, half>(*pool, c, bias, x, ldx, out, rows)
                      : multiply<4, float>(*pool, c, bias, x, ldx, out, rows);
    else
        c.half_scales ? multiply<8, half>(*pool, c, bias, x, ldx, out, rows)
                      : multiply<8, float>(*pool, c, bias, x, ldx, out, rows);
}
QUIRE_RECORDED(quire_codes_linear_a8_bf16)
