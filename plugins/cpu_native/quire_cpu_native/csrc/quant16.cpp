// y = x · weightᵀ with the weight in codes: for x in bf16, as whole numbers of 16 bits.
//
// Each row of x is scaled by its own largest value in a span of at most 256 inputs of a group, 2^-15 of which is lost:
// far less than x has lost already. Products and their sums are exact, whatever their order.
#include <cmath>

#include "codes.h"
#include "recorded.h"

namespace quire {
namespace {

constexpr int MANY = W == 16 ? 6 : 5;  // rows of a tile: as many as the registers hold sums
constexpr int FEW = W == 16 ? 64 : 8;   // rows up to which codes are unpacked in registers, and read in pieces
constexpr int READING = 2;              // rows up to which threads share out the weights in long pieces
constexpr int64_t SPAN = 256;           // 255 · 32767 · 256 < 2^31

// x as whole numbers, with a scale and a sum for each span: [rows][depth], [rows][spans].
struct Rows {
    int16_t* values;
    float *scales, *sums;
    int64_t depth, spans;
};

// Spans of one group, and words of each; the last may have fewer.
struct Spans {
    int64_t count, words;
    Spans(const Codes& c) {
        words = std::min(c.padded_group(), SPAN) / c.per_word();
        count = (c.padded_group() / c.per_word() + words - 1) / words;
    }
};

template <int BITS>
void round_span(const bf16* x, int64_t count, int16_t* to, int64_t padded, float& scale, float& total) {
    V most = zero(), poison = zero(), sums = zero();
    for (int64_t k = 0; k < count; k += W) {
        V value = load_some(x + k, std::min<int64_t>(W, count - k));
        most = max(most, max(value, sub(zero(), value)));
        poison = add(poison, sub(value, value));  // what is no finite number must not get lost
    }
    float top = largest(most) + sum(poison);
    bool usable = top > 1e-30f;
    V inverse = set1(usable ? 32767.0f / top : 0.0f);
    scale = usable ? top / 32767.0f : top;  // not a number: nor is the result
    for (int64_t k = 0; k < padded; k += W) {
        V value = zero();
        if (usable && k < count) value = round_to_even(mul(load_some(x + k, std::min<int64_t>(W, count - k)), inverse));
        sums = add(sums, value);
        store_some(to + k, value, std::min<int64_t>(W, padded - k), Order<BITS>());
    }
    total = sum(sums);  // exact
}

template <int BITS>
Rows round_rows(Pool& pool, const Codes& c, const bf16* x, int64_t ldx, int64_t rows) {
    Spans spans(c);
    Rows out{nullptr, nullptr, nullptr, c.depth(), c.groups() * spans.count};
    out.values = (int16_t*)pool.shared((rows * out.depth + 1) / 2);
    out.scales = pool.shared2(2 * rows * out.spans), out.sums = out.scales + rows * out.spans;
    constexpr int64_t WORD = 32 / BITS;
    pool.run((rows + 3) / 4, [=, &c](int64_t task, Scratch&) {
        for (int64_t row = task * 4; row < std::min(rows, task * 4 + 4); row++)
            for (int64_t g = 0; g < c.groups(); g++)
                for (int64_t s = 0; s < spans.count; s++) {
                    int64_t begin = s * spans.words * WORD, padded = std::min(spans.words * WORD, c.padded_group() - begin);
                    int64_t input = g * c.group + begin;
                    int64_t count = std::min(std::min(c.group - begin, c.inputs - input), padded);
                    int64_t at = row * out.spans + g * spans.count + s;
                    round_span<BITS>(x + row * ldx + input, count, out.values + row * out.depth + g * c.padded_group() + begin,
                                     padded, out.scales[at], out.sums[at]);
                }
    });
    return out;
}

static inline I pair_at(const int16_t* x) {
    int32_t both;
    memcpy(&both, x, 4);
    return set1_int(both);
}

template <int BITS>
static inline I code_of(I word, int i) { return BITS == 4 ? field4_of16(word, 4 * i) : field8_of16(word, 8 * i); }

// Two vectors of columns of a panel, their codes as numbers of 16 bits: [depth / 2][2 vectors][W][2 inputs]. Where all
// zeros are in the middle they are taken off already.
struct Wide {
    static constexpr bool CENTRED = true;
    const int16_t* codes;
};

template <int BITS, class Scale>
Wide expand(const Columns<BITS, Scale>& c, int16_t* to) {
    I middle = set1_int(c.zeros ? 0 : (int32_t)c.middle * 0x00010001);
    for (int64_t w = 0; w < c.groups * c.words; w++)
        for (int v = 0; v < 2; v++) {
            I word = load_int(c.word(0, w, v));
            for (int i = 0; i < c.WORD / 2; i++) {
                I code = sub_of16(code_of<BITS>(word, i), middle);
                memcpy(to + ((w * c.WORD / 2 + i) * 2 + v) * 2 * W, &code, sizeof code);
            }
        }
    return Wide{to};
}

// Adds words `begin` to `end` - 1, counted from the first group on, of MB rows from `x` on.
template <int BITS, class Scale, int MB, int NV>
static inline void add_words(const Columns<BITS, Scale>&, Wide wide, const int16_t* x, int64_t ldx, int64_t begin,
                             int64_t end, I sums[MB][NV]) {
    static_assert(NV == 2);
    constexpr int PAIRS = 16 / BITS;
    I own[MB][NV];  // in registers: the compiler would write what it was given at every step
    for (int m = 0; m < MB; m++)
        for (int v = 0; v < NV; v++) own[m][v] = sums[m][v];
    for (int64_t k = begin * PAIRS; k < end * PAIRS; k++) {
        I first = load_int(wide.codes + 4 * k * W), second = load_int(wide.codes + (4 * k + 2) * W);
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

// The same from the codes themselves, for rows too few to be worth their expansion.
struct Packed {
    static constexpr bool CENTRED = false;
};
template <int BITS, class Scale, int MB, int NV>
static inline void add_words(const Columns<BITS, Scale>& c, Packed, const int16_t* x, int64_t ldx, int64_t begin,
                             int64_t end, I sums[MB][NV]) {
    constexpr int PAIRS = 16 / BITS;
    for (int64_t w = begin; w < end; w++) {
        I word[NV];
        for (int v = 0; v < NV; v++) {
            word[v] = load_int(c.word(0, w, v));
#if defined(__GNUC__)
            __builtin_prefetch(c.word(0, w, v) + 8192);
#endif
        }
        for (int i = 0; i < PAIRS; i++) {
            I both[MB];
            for (int m = 0; m < MB; m++) both[m] = pair_at(x + m * ldx + 2 * (w * PAIRS + i));
            for (int v = 0; v < NV; v++) {
                I code = code_of<BITS>(word[v], i);
                for (int m = 0; m < MB; m++) sums[m][v] = add_products(sums[m][v], code, both[m]);
            }
        }
    }
}

// Groups `first` to `last` - 1.
template <int BITS, class Scale, class Source, int MB, int NV>
static inline void tile(const Columns<BITS, Scale>& c, Source source, const Spans& spans, const Rows& x, int64_t row,
                        int64_t first, int64_t last, V acc[MB][NV]) {
    const int16_t* values = x.values + row * x.depth;
    for (int64_t g = first; g < last; g++) {
        V scales[NV];
        for (int v = 0; v < NV; v++) scales[v] = c.scale(g, v);
        for (int64_t s = 0; s < spans.count; s++) {
            I sums[MB][NV];
            for (int m = 0; m < MB; m++)
                for (int v = 0; v < NV; v++) sums[m][v] = zero_int();
            int64_t begin = g * c.words + s * spans.words, end = g * c.words + std::min(c.words, (s + 1) * spans.words);
            add_words<BITS, Scale, MB, NV>(c, source, values, x.depth, begin, end, sums);
            for (int m = 0; m < MB; m++) {
                int64_t at = (row + m) * x.spans + g * spans.count + s;
                V scale = set1(x.scales[at]);
                if (c.zeros) {
                    V sum = set1(x.sums[at]);
                    for (int v = 0; v < NV; v++) {
                        V exact = sub(to_float(sums[m][v]), mul(c.zero_of(g, v), sum));
                        acc[m][v] = fma(mul(exact, scale), scales[v], acc[m][v]);
                    }
                } else {
                    if (!Source::CENTRED) {
                        I off = set1_int((int32_t)c.middle * (int32_t)x.sums[at]);
                        for (int v = 0; v < NV; v++) sums[m][v] = sub_int(sums[m][v], off);
                    }
                    for (int v = 0; v < NV; v++) acc[m][v] = fma(mul(to_float(sums[m][v]), scale), scales[v], acc[m][v]);
                }
            }
        }
    }
}

// What a task computes: rows of x times the columns of a panel.
struct Part {
    const Codes& codes;
    const Spans& spans;
    const Rows& x;
    int64_t panel, row;
    bf16* out;
    const bf16* bias;

    template <int MB, int NV>
    void emit_at(V acc[MB][NV], int64_t at_row, int64_t first) const {
        int64_t column = panel * PANEL + first, left = codes.outputs - column;
        if (left > 0)
            emit<bf16, MB, NV>(acc, out + at_row * codes.outputs + column, codes.outputs, left, bias ? bias + column : nullptr);
    }
};

// Some groups of all columns at a time, rows in tiles of MB at most; SUMS: rows that there may be. See `panel_in_pieces`.
template <int BITS, class Scale, int MB, int NV, int SUMS>
void few_rows(const Part& p, int64_t count) {
    constexpr int strips = PANEL / W / NV;
    V sums[strips][SUMS][NV];
    for (int s = 0; s < strips; s++)
        for (int64_t m = 0; m < count; m++)
            for (int v = 0; v < NV; v++) sums[s][m][v] = zero();
    int64_t groups = p.codes.groups(), step = std::max<int64_t>(1, DEPTH / p.codes.group);
    for (int64_t g = 0; g < groups; g += step)
        for (int s = 0; s < strips; s++) {
            Columns<BITS, Scale> c(p.codes, p.panel, s * NV * W);
            by_tiles<MB>(count, [&](auto rows, int64_t m) {
                V acc[rows.value][NV];
                copy<rows.value, NV>(acc, sums[s] + m);
                tile<BITS, Scale, Packed, rows.value, NV>(c, Packed{}, p.spans, p.x, p.row + m, g,
                                                          std::min(groups, g + step), acc);
                copy<rows.value, NV>(sums[s] + m, acc);
            });
        }
    for (int s = 0; s < strips; s++)
        for (int64_t m = 0; m < count; m++) p.emit_at<1, NV>(sums[s] + m, p.row + m, s * NV * W);
}

template <int BITS, class Scale>
void many_rows(const Part& p, int64_t count, int64_t columns, Scratch& scratch) {
    int16_t* to = (int16_t*)scratch.floats(p.codes.depth() * W);
    for (int64_t first = 0; first < columns; first += 2 * W) {
        Columns<BITS, Scale> c(p.codes, p.panel, first);
        Wide wide = expand(c, to);
        by_tiles<MANY>(count, [&](auto rows, int64_t m) {
            V acc[rows.value][2] = {};
            tile<BITS, Scale, Wide, rows.value, 2>(c, wide, p.spans, p.x, p.row + m, 0, c.groups, acc);
            p.emit_at<rows.value, 2>(acc, p.row + m, first);
        });
    }
}

template <int BITS, class Scale>
void multiply(Pool& pool, const Codes& c, const bf16* bias, const bf16* x, int64_t ldx, bf16* out, int64_t rows) {
    Rows rounded = round_rows<BITS>(pool, c, x, ldx, rows);
    Spans spans(c);
    int64_t parts = std::min<int64_t>(std::max<int64_t>(1, 4 * pool.threads() / c.panels()), (rows + 23) / 24);
    int64_t step = (rows + parts - 1) / parts;
    auto compute = [=, &c, &spans, &rounded](int64_t panel, int64_t part, Scratch& scratch) {
        int64_t row = part * step, count = std::min(step, rows - row);
        int64_t columns = std::min<int64_t>(PANEL, c.outputs - panel * PANEL);
        Part p{c, spans, rounded, panel, row, out, bias};
        if (count <= 0) return;
        if (count <= 2) return few_rows<BITS, Scale, 2, 4, 2>(p, count);
        if (count <= FEW) return few_rows<BITS, Scale, 4, 2, FEW>(p, count);
        many_rows<BITS, Scale>(p, count, columns, scratch);
    };
    // Where reading the weights is what takes time, a thread reads on where it was.
    int64_t together = rows <= READING ? std::max<int64_t>(1, c.panels() / (4 * pool.threads())) : 1;
    pool.run((c.panels() + together - 1) / together * parts, [=, &c](int64_t task, Scratch& scratch) {
        int64_t first = task / parts * together;
        for (int64_t panel = first; panel < std::min(c.panels(), first + together); panel++)
            compute(panel, task % parts, scratch);
    });
}

}  // namespace
}  // namespace quire

using namespace quire;

extern "C" void quire_codes_linear_bf16(Pool* pool, const void* fields, const bf16* bias, const bf16* x, int64_t ldx,
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
QUIRE_RECORDED(quire_codes_linear_bf16)
