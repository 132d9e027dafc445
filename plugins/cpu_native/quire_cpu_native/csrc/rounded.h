// What both forms of rounded inputs share: y = x · weightᵀ with the weight in codes and x, in bf16, as whole numbers.
//
// Each row of x is scaled by its own largest value in each span of inputs of a group. Sums of products within a span are
// exact, whatever their order; spans are added in their order, whatever the tile. A Form says what the numbers are:
//   Number, LARGEST, SPAN: their type, the largest of them, and inputs to a scale at most;
//   store<BITS>(to, values, n): n of them, in the order in which they meet codes;
//   TAKEN_OFF<BITS>: what is taken off codes before they are multiplied; SUMMED<BITS>: whether sums of a lane are whole
//   before `whole<BITS>` makes them so;
//   add_words<BITS, MB, NV>(columns, x, ldx, begin, end, sums): adds words `begin` to `end` - 1 of MB rows from x on.
#pragma once
#include <cmath>

#include "codes.h"
#include "recorded.h"

namespace quire {

constexpr int FEW_ROWS = W == 16 ? 64 : 8;  // rows up to which codes are unpacked in registers, and read in pieces
constexpr int READING = 2;                  // rows up to which threads share out the weights in long pieces

// x as whole numbers, with a scale and a sum for each span: [rows][depth], [rows][spans].
template <class Form>
struct Rows {
    typename Form::Number* values;
    float *scales, *sums;
    int64_t depth, spans;
};

// Spans of one group, and words of each; the last may have fewer.
struct Spans {
    int64_t count, words;
    Spans(const Codes& c, int64_t most) {
        words = std::min(c.padded_group(), most) / c.per_word();
        count = (c.padded_group() / c.per_word() + words - 1) / words;
    }
};

template <class Form, int BITS>
void round_span(const bf16* x, int64_t count, typename Form::Number* to, int64_t padded, float& scale, float& total) {
    V most = zero(), poison = zero(), sums = zero();
    for (int64_t k = 0; k < count; k += W) {
        V value = load_some(x + k, std::min<int64_t>(W, count - k));
        most = max(most, max(value, sub(zero(), value)));
        poison = add(poison, sub(value, value));  // what is no finite number must not get lost
    }
    float top = largest(most) + sum(poison);
    bool usable = top > 1e-30f;
    V inverse = set1(usable ? Form::LARGEST / top : 0.0f);
    scale = usable ? top / Form::LARGEST : top;  // not a number: nor is the result
    for (int64_t k = 0; k < padded; k += W) {
        V value = zero();
        if (usable && k < count) value = round_to_even(mul(load_some(x + k, std::min<int64_t>(W, count - k)), inverse));
        sums = add(sums, value);
        Form::template store<BITS>(to + k, value, std::min<int64_t>(W, padded - k));
    }
    total = sum(sums);  // exact
}

template <class Form, int BITS>
Rows<Form> round_rows(Pool& pool, const Codes& c, const Spans& spans, const bf16* x, int64_t ldx, int64_t rows) {
    constexpr int64_t WORD = 32 / BITS;
    Rows<Form> out{nullptr, nullptr, nullptr, c.depth(), c.groups() * spans.count};
    out.values = (typename Form::Number*)pool.shared((rows * out.depth * sizeof(*out.values) + 3) / 4);
    out.scales = pool.shared2(2 * rows * out.spans), out.sums = out.scales + rows * out.spans;
    pool.run((rows + 3) / 4, [=, &c](int64_t task, Scratch&) {
        for (int64_t row = task * 4; row < std::min(rows, task * 4 + 4); row++)
            for (int64_t g = 0; g < c.groups(); g++)
                for (int64_t s = 0; s < spans.count; s++) {
                    int64_t begin = s * spans.words * WORD, padded = std::min(spans.words * WORD, c.padded_group() - begin);
                    int64_t input = g * c.group + begin, at = row * out.spans + g * spans.count + s;
                    int64_t count = std::max<int64_t>(0, std::min({c.group - begin, c.inputs - input, padded}));
                    round_span<Form, BITS>(x + row * ldx + input, count,
                                           out.values + row * out.depth + g * c.padded_group() + begin, padded,
                                           out.scales[at], out.sums[at]);
                }
    });
    return out;
}

// Groups `first` to `last` - 1 of MB rows.
template <class Form, int BITS, int MB, int NV, class Scale, class Source>
static inline void tile(const Columns<BITS, Scale>& c, const Source& source, const Spans& spans, const Rows<Form>& x,
                        int64_t row, int64_t first, int64_t last, V acc[MB][NV]) {
    const auto* values = x.values + row * x.depth;
    const float taken = Source::CENTRED && !c.zeros ? c.middle : Form::template TAKEN_OFF<BITS>;
    const int32_t middle = (int32_t)(c.middle - taken);
    for (int64_t g = first; g < last; g++) {
        V scales[NV];
        for (int v = 0; v < NV; v++) scales[v] = c.scale(g, v);
        for (int64_t s = 0; s < spans.count; s++) {
            int64_t at = row * x.spans + g * spans.count + s;
            I sums[MB][NV];
            for (int m = 0; m < MB; m++) {
                bool early = Form::template SUMMED<BITS> && !c.zeros;  // what the middle adds is taken off before
                I start = early ? set1_int(-middle * (int32_t)x.sums[at + m * x.spans]) : zero_int();
                for (int v = 0; v < NV; v++) sums[m][v] = start;
            }
            int64_t begin = g * c.words + s * spans.words, end = g * c.words + std::min(c.words, (s + 1) * spans.words);
            source.template add_words<MB, NV>(values, x.depth, begin, end, sums);
            for (int m = 0; m < MB; m++) {
                V scale = set1(x.scales[at + m * x.spans]), sum = set1(x.sums[at + m * x.spans]);
                I off = set1_int(middle * (int32_t)x.sums[at + m * x.spans]);
                for (int v = 0; v < NV; v++) {
                    I whole = Form::template whole<BITS>(sums[m][v]);
                    if (!Form::template SUMMED<BITS> && !c.zeros) whole = sub_int(whole, off);
                    V exact = to_float(whole);
                    if (c.zeros) exact = sub(exact, mul(sub(c.zero_of(g, v), set1(taken)), sum));
                    acc[m][v] = fma(mul(exact, scale), scales[v], acc[m][v]);
                }
            }
        }
    }
}

// What a task computes: rows of x times the columns of a panel.
template <class Form>
struct Part {
    const Codes& codes;
    const Spans& spans;
    const Rows<Form>& x;
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

// The codes as they are packed, unpacked for each tile.
template <class Form, int BITS, class Scale>
struct Packed {
    static constexpr bool CENTRED = false;
    const Columns<BITS, Scale>& columns;
    template <int MB, int NV>
    void add_words(const typename Form::Number* x, int64_t ldx, int64_t begin, int64_t end, I sums[MB][NV]) const {
        Form::template add_words<BITS, MB, NV>(columns, x, ldx, begin, end, sums);
    }
};

// Some groups of all columns at a time, rows in tiles of MB at most; SUMS: rows that there may be. See `panel_in_pieces`.
template <class Form, int BITS, class Scale, int MB, int NV, int SUMS>
void few_rows(const Part<Form>& p, int64_t count) {
    constexpr int strips = PANEL / W / NV;
    V sums[strips][SUMS][NV];
    for (int s = 0; s < strips; s++)
        for (int64_t m = 0; m < count; m++)
            for (int v = 0; v < NV; v++) sums[s][m][v] = zero();
    int64_t groups = p.codes.groups(), step = strips == 1 ? groups : std::max<int64_t>(1, DEPTH / p.codes.group);
    for (int64_t g = 0; g < groups; g += step)
        for (int s = 0; s < strips; s++) {
            Columns<BITS, Scale> c(p.codes, p.panel, s * NV * W);
            Packed<Form, BITS, Scale> packed{c};
            by_tiles<MB>(count, [&](auto rows, int64_t m) {
                V acc[rows.value][NV];
                copy<rows.value, NV>(acc, sums[s] + m);
                tile<Form, BITS, rows.value, NV>(c, packed, p.spans, p.x, p.row + m, g, std::min(groups, g + step), acc);
                copy<rows.value, NV>(sums[s] + m, acc);
            });
        }
    for (int s = 0; s < strips; s++)
        for (int64_t m = 0; m < count; m++) p.template emit_at<1, NV>(sums[s] + m, p.row + m, s * NV * W);
}

// More rows than there is room for at once: the codes are near already when the next ones have their turn.
template <class Form, int BITS, class Scale>
void by_few_rows(Part<Form> p, int64_t count) {
    for (int64_t end = p.row + count, some; p.row < end; p.row += some) {
        some = even_share(end - p.row, FEW_ROWS);
        few_rows<Form, BITS, Scale, 4, 2, FEW_ROWS>(p, some);
    }
}

// Rounds x and shares out the work. many_rows<BITS, Scale>(part, count, scratch) computes more than FEW_ROWS rows.
template <class Form, int BITS, class Scale, class Many>
void multiply(Pool& pool, const Codes& c, const bf16* bias, const bf16* x, int64_t ldx, bf16* out, int64_t rows,
              const Many& many_rows) {
    Spans spans(c, Form::SPAN);
    Rows<Form> rounded = round_rows<Form, BITS>(pool, c, spans, x, ldx, rows);
    int64_t parts = std::min<int64_t>(std::max<int64_t>(1, 4 * pool.threads() / c.panels()), (rows + 23) / 24);
    int64_t step = (rows + parts - 1) / parts;
    auto compute = [=, &c, &spans, &rounded](int64_t panel, int64_t part, Scratch& scratch) {
        int64_t row = part * step, count = std::min(step, rows - row);
        Part<Form> p{c, spans, rounded, panel, row, out, bias};
        if (count <= 0) return;
        if (count <= 2) return few_rows<Form, BITS, Scale, 2, 4, 2>(p, count);
        if (count <= 4 && W == 16) return few_rows<Form, BITS, Scale, 4, 4, 4>(p, count);
        if (count <= FEW_ROWS) return few_rows<Form, BITS, Scale, 4, 2, FEW_ROWS>(p, count);
        many_rows(p, count, scratch);
    };
    // Where reading the weights is what takes time, a thread reads on where it was.
    int64_t together = rows <= READING ? std::max<int64_t>(1, c.panels() / (4 * pool.threads())) : 1;
    pool.run((c.panels() + together - 1) / together * parts, [=, &c](int64_t task, Scratch& scratch) {
        int64_t first = task / parts * together;
        for (int64_t panel = first; panel < std::min(c.panels(), first + together); panel++)
            compute(panel, task % parts, scratch);
    });
}

// Calls `with` with the number of bits and the type of scales that the codes have: std::integral_constant, and a scale.
template <class With>
void by_form(const Codes& c, const With& with) {
    using Four = std::integral_constant<int, 4>;
    using Eight = std::integral_constant<int, 8>;
    if (c.bits == 4)
        c.half_scales ? with(Four(), half()) : with(Four(), float());
    else
        c.half_scales ? with(Eight(), half()) : with(Eight(), float());
}

}  // namespace quire
