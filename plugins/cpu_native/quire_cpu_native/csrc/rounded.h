// What both forms of rounded inputs share: y = x · weightᵀ with the weight in codes and x, in bf16, as whole numbers.
//
// Each row of x is scaled by its own largest value in each span of inputs of a group. Sums of products within a span are
// exact, whatever their order; spans are added in their order, whatever the tile. A Form says what the numbers are:
//   Number, LARGEST, SPAN: their type, the largest of them, and inputs to a scale at most;
//   store(to, values, n): n of them, in the order in which they meet codes;
//   TAKEN_OFF<BITS>: what is taken off codes before they are multiplied; SUMMED<BITS>: whether sums of a lane are whole
//   before `whole<BITS>` makes them so;
//   add_word<BITS, MB, NV>(word, x, ldx, sums): adds the products of NV vectors of codes with MB rows from x on;
//   FETCHED<BITS>: whether codes are fetched early where reading them is what takes time. Little work leaves the processor
//   ahead of itself, and what is fetched then in vain took a fifth of the time;
//   FOUR_WIDE<BITS>: whether registers hold what tiles of four rows by four vectors need.
#pragma once
#include <cmath>

#include "codes.h"
#include "recorded.h"

namespace quire {

constexpr int FEW_ROWS = W == 16 ? 64 : 8;  // rows up to which codes are unpacked in registers, and read in pieces
constexpr int TILE_ROWS = W == 16 ? 6 : 4;  // rows of a tile of two vectors: as many as the registers hold sums
constexpr int READING = 2;                  // rows up to which reading the codes is all that takes time
constexpr int64_t SOON = 4096;              // bytes by which they are then fetched early
constexpr int PLAIN = 32;                   // inputs of the spans that most weights have
constexpr int64_t PIECE = 8192;             // bytes of a panel's codes that all rows have their turn at

// x as whole numbers: [rows][depth]. For each span a scale, the sum, and what is added to products for zeros that are all in
// the middle: [spans][stride].
template <class Form>
struct Rows {
    typename Form::Number* values;
    float *scales, *sums;
    int32_t* less;
    int64_t depth, spans, stride;
};

// Spans of one group, and words of each; the last may have fewer.
struct Spans {
    int64_t count, words;
    bool plain;  // see `plain_tile`
    Spans(const Codes& c, int64_t most) {
        words = std::min(c.padded_group(), most) / c.per_word();
        count = (c.padded_group() / c.per_word() + words - 1) / words;
        plain = words * c.per_word() == PLAIN && c.padded_group() == count * PLAIN;
    }
};

// The largest size of n numbers; no number where one of them is none, or infinite.
static inline float largest(const bf16* x, int64_t n) {
    uint16_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint16_t size = x[i] & 0x7fff;
        most = size > most ? size : most;
    }
    return most < 0x7f80 ? to_float(most) : NAN;
}

template <class Form>
static inline void round_span(const bf16* x, int64_t count, typename Form::Number* to, int64_t padded, float& scale,
                              float& total) {
    float top = largest(x, count);
    bool usable = top > 1e-30f;
    V inverse = set1(usable ? Form::LARGEST / top : 0.0f), sums = zero();
    scale = usable ? top / Form::LARGEST : top;  // not a number: nor is the result
    for (int64_t k = 0; k < padded; k += W) {
        V value = zero();
        if (usable && k < count) value = round_to_even(mul(load_some(x + k, std::min<int64_t>(W, count - k)), inverse));
        sums = add(sums, value);
        Form::store(to + k, value, std::min<int64_t>(W, padded - k));
    }
    total = sum(sums);  // exact
}

template <class Form, int BITS>
Rows<Form> round_rows(Pool& pool, const Codes& c, const Spans& spans, const bf16* x, int64_t ldx, int64_t rows) {
    // Not a power of two, whose multiples would share few places of a cache.
    const int64_t stride = rows < 16 ? rows : rows + 16 + -rows % 16;
    Rows<Form> out{nullptr, nullptr, nullptr, nullptr, c.depth(), c.groups() * spans.count, stride};
    const int32_t middle = c.zeros ? 0 : (int32_t)(c.middle - Form::template TAKEN_OFF<BITS>);
    out.values = (typename Form::Number*)pool.shared((rows * out.depth * sizeof(*out.values) + 3) / 4);
    out.scales = pool.shared2(3 * stride * out.spans), out.sums = out.scales + stride * out.spans;
    out.less = (int32_t*)(out.sums + stride * out.spans);
    const int64_t groups = c.groups(), group = c.group, wide = c.padded_group(), inputs = c.inputs;
    const int64_t most = spans.words * c.per_word(), per_group = spans.count;
    auto round_group = [=](int64_t row, int64_t g) {
        for (int64_t s = 0; s < per_group; s++) {
            int64_t begin = s * most, padded = std::min(most, wide - begin), at = (g * per_group + s) * stride + row;
            int64_t count = std::max<int64_t>(0, std::min({group - begin, inputs - g * group - begin, padded}));
            const bf16* from = x + row * ldx + g * group + begin;
            auto* to = out.values + row * out.depth + g * wide + begin;
            if (count == PLAIN && padded == PLAIN)
                round_span<Form>(from, PLAIN, to, PLAIN, out.scales[at], out.sums[at]);
            else
                round_span<Form>(from, count, to, padded, out.scales[at], out.sums[at]);
            out.less[at] = -middle * (int32_t)out.sums[at];
        }
    };
    pool.run((rows + 3) / 4, [=](int64_t task, Scratch&) {
        for (int64_t row = task * 4; row < std::min(rows, task * 4 + 4); row++)
            for (int64_t g = 0; g < groups; g++) round_group(row, g);
    });
    return out;
}

// Fetches codes that have their turn a piece later, and their scales: each pass over a group its share of them.
struct Ahead {
    const uint8_t *codes, *scales;
    int64_t code_lines, scale_lines;  // of 64 bytes, in a group
    int64_t passes, pass = 0;

    static int64_t bytes(const Codes& c) { return c.padded_group() * c.bits / 8 * PANEL; }
    Ahead(const Codes& c, int64_t panel, int64_t passes)
        : code_lines(bytes(c) / 64), scale_lines(c.half_scales ? 2 : 4), passes(passes) {
        int64_t group = panel * c.groups(), later = std::max<int64_t>(1, PIECE / bytes(c));
        codes = c.codes + group * bytes(c) + PIECE;
        scales = (const uint8_t*)c.scales + (group + later) * scale_lines * 64;
    }
    QUIRE_INLINE void fetch(int64_t g) const {
        for (int64_t line = pass; line < code_lines; line += passes) fetch_later(codes + (g * code_lines + line) * 64);
        for (int64_t line = pass; line < scale_lines; line += passes) fetch_later(scales + (g * scale_lines + line) * 64);
    }
    void stop() { pass = INT64_MAX / 2; }
};

// Vectors that are unpacked together: those of 6 bits would be many, and where reading is what takes time they are best
// taken in memory's order.
template <int BITS, int MB, int NV>
constexpr int abreast() { return BITS == 6 && MB <= READING && NV > 2 ? 2 : NV; }

// Fetches what comes SOON after the words of NV vectors.
template <int BITS, int NV>
QUIRE_INLINE static inline void fetch_words(const uint8_t* words) {
    for (int line = 0; line < Word<BITS>::PARTS * NV * W * 4; line += 64) fetch_soon(words + line + SOON);
}

// The PLAIN inputs of a span. Where reading is what takes time, memory is read in its order, which a compiler changes
// that sees all words at once; otherwise it sees them, and moves no sums about.
template <class Form, int BITS, int MB, int NV>
static inline void add_span(const uint8_t* codes, const typename Form::Number* x, int64_t ldx, int64_t words,
                            I sums[MB][NV]) {
    constexpr int WORD = Word<BITS>::INPUTS, BYTES = Word<BITS>::BYTES;
    if constexpr (MB <= READING) {
        // They are equal: not to know makes a loop of two words, which one row is faster without.
        const int64_t count = BITS == 6 && MB > 1 ? words : PLAIN / WORD;
#if defined(__GNUC__)
#pragma GCC unroll 1
#endif
        for (int64_t w = 0; w < count; w++) {
            if constexpr (Form::template FETCHED<BITS>) fetch_words<BITS, NV>(codes + w * BYTES);
            Form::template add_word<BITS, MB, NV>(codes + w * BYTES, x + w * WORD, ldx, sums);
        }
    } else {
#if defined(__GNUC__)
#pragma GCC unroll 8
#endif
        for (int w = 0; w < PLAIN / WORD; w++)
            Form::template add_word<BITS, MB, NV>(codes + w * BYTES, x + w * WORD, ldx, sums);
    }
}

// Groups `first` to `last` - 1 of MB rows, where every span has PLAIN inputs. Its loops hold little but what is needed, and
// take as many steps as the compiler knows, so that all sums stay in registers.
template <class Form, int BITS, int MB, int NV, class Scale>
void plain_tile(const Columns<BITS, Scale>& c, const Spans& spans, const Rows<Form>& x, int64_t row, int64_t first,
                int64_t last, const Ahead& ahead, V sums[MB][NV]) {
    constexpr bool EARLY = Form::template SUMMED<BITS>;  // what the middle adds is taken off before
    constexpr int SPAN_BYTES = PLAIN / Word<BITS>::INPUTS * Word<BITS>::BYTES;
    const int64_t per_group = spans.count, words = spans.words, rows = x.stride, ldx = x.depth;
    const auto* values = x.values + row * ldx + first * per_group * PLAIN;
    const float* scale = x.scales + first * per_group * rows + row;
    const int32_t* less = x.less + first * per_group * rows + row;
    const uint8_t* codes = c.word(first, 0, 0);
    const int64_t sums_behind = x.sums - x.scales;
    V acc[MB][NV];
    for (int m = 0; m < MB; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = sums[m][v];
    for (int64_t g = first, s = 0; g < last;) {
        if (MB > READING && s == 0) ahead.fetch(g);
        I whole[MB][NV];
        for (int m = 0; m < MB; m++)
            for (int v = 0; v < NV; v++) whole[m][v] = EARLY ? set1_int(less[m]) : zero_int();
        add_span<Form, BITS, MB, NV>(codes, values, ldx, words, whole);
        V scales[NV];
        for (int v = 0; v < NV; v++) scales[v] = c.scale(g, v);
        V exact[MB][NV];
        for (int m = 0; m < MB; m++)
            for (int v = 0; v < NV; v++) {
                I sum = Form::template whole<BITS>(whole[m][v]);
                exact[m][v] = to_float(EARLY ? sum : add_int(sum, set1_int(less[m])));
            }
        if (c.zeros)
            for (int v = 0; v < NV; v++) {
                V zero = sub(c.zero_of(g, v), set1(Form::template TAKEN_OFF<BITS>));
                for (int m = 0; m < MB; m++) exact[m][v] = sub(exact[m][v], mul(zero, set1(scale[m + sums_behind])));
            }
        for (int m = 0; m < MB; m++)
            for (int v = 0; v < NV; v++) acc[m][v] = fma(mul(exact[m][v], set1(scale[m])), scales[v], acc[m][v]);
        scale += rows, less += rows, values += PLAIN, codes += SPAN_BYTES;
        if (++s == per_group) s = 0, g++;
    }
    for (int m = 0; m < MB; m++)
        for (int v = 0; v < NV; v++) sums[m][v] = acc[m][v];
}

// Groups `first` to `last` - 1 of MB rows.
template <class Form, int BITS, int MB, int NV, class Scale, class Source>
static inline void tile(const Columns<BITS, Scale>& c, const Source& source, const Spans& spans, const Rows<Form>& x,
                        int64_t row, int64_t first, int64_t last, const Ahead& ahead, V acc[MB][NV]) {
    constexpr bool EARLY = Form::template SUMMED<BITS>;  // what the middle adds is taken off before
    const auto* values = x.values + row * x.depth;
    const float taken = Form::template TAKEN_OFF<BITS>;
    for (int64_t g = first; g < last; g++) {
        if (NV * W < PANEL) ahead.fetch(g);
        for (int64_t s = 0; s < spans.count; s++) {
            int64_t at = (g * spans.count + s) * x.stride + row;
            I sums[MB][NV];
            for (int m = 0; m < MB; m++)
                for (int v = 0; v < NV; v++) sums[m][v] = EARLY && !Source::CENTRED ? set1_int(x.less[at + m]) : zero_int();
            int64_t begin = g * c.words + s * spans.words, end = g * c.words + std::min(c.words, (s + 1) * spans.words);
            source.template add_words<MB, NV>(values, x.depth, begin, end, sums);
            V scales[NV];
            for (int v = 0; v < NV; v++) scales[v] = c.scale(g, v);
            for (int m = 0; m < MB; m++) {
                V scale = set1(x.scales[at + m]);
                for (int v = 0; v < NV; v++) {
                    I whole = Form::template whole<BITS>(sums[m][v]);
                    if (!EARLY && !Source::CENTRED) whole = add_int(whole, set1_int(x.less[at + m]));
                    V exact = to_float(whole);
                    if (c.zeros) exact = sub(exact, mul(sub(c.zero_of(g, v), set1(taken)), set1(x.sums[at + m])));
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
        I own[MB][NV];  // in registers: the compiler would write what it was given at every step
        for (int m = 0; m < MB; m++)
            for (int v = 0; v < NV; v++) own[m][v] = sums[m][v];
        for (int64_t w = begin; w < end; w++) {
            if (NV * W == PANEL && Form::template FETCHED<BITS>) fetch_words<BITS, NV>(columns.word(0, w, 0));
            Form::template add_word<BITS, MB, NV>(columns.word(0, w, 0), x + w * columns.WORD, ldx, own);
        }
        for (int m = 0; m < MB; m++)
            for (int v = 0; v < NV; v++) sums[m][v] = own[m][v];
    }
};

template <class Form, int BITS, int MB, int NV, class Scale>
void any_tile(const Columns<BITS, Scale>& c, const Spans& spans, const Rows<Form>& x, int64_t row, int64_t first,
              int64_t last, const Ahead& ahead, V (*sums)[NV]) {
    if (spans.plain) return plain_tile<Form, BITS, MB, NV>(c, spans, x, row, first, last, ahead, sums);
    tile<Form, BITS, MB, NV>(c, Packed<Form, BITS, Scale>{c}, spans, x, row, first, last, ahead, sums);
}

// Rows in tiles of MB at most, NV vectors of columns, a piece of the panel at a time. SUMS: rows that there may be. So all
// columns of a piece are used by all rows while it is near, and the next comes in meanwhile, as evenly as can be.
template <class Form, int BITS, class Scale, int MB, int NV, int SUMS>
void few_rows(const Part<Form>& p, int64_t count) {
    constexpr int strips = PANEL / W / NV;
    V sums[strips][SUMS][NV];
    for (int s = 0; s < strips; s++)
        for (int64_t m = 0; m < count; m++)
            for (int v = 0; v < NV; v++) sums[s][m][v] = zero();
    const int64_t groups = p.codes.groups(), passes = (count + MB - 1) / MB * strips;
    const int64_t piece = (MB <= READING ? PIECE / 4 : PIECE) / Ahead::bytes(p.codes);
    const int64_t step = passes == 1 ? groups : std::max<int64_t>(1, piece);
    for (int64_t g = 0; g < groups; g += step) {
        Ahead ahead(p.codes, p.panel, passes);
        int64_t end = std::min(groups, g + step);
        for (int s = 0; s < strips; s++) {
            Columns<BITS, Scale> c(p.codes, p.panel, s * NV * W);
            by_tiles<MB>(count, [&](auto rows, int64_t m) {
                any_tile<Form, BITS, rows.value, NV>(c, p.spans, p.x, p.row + m, g, end, ahead, sums[s] + m);
                ahead.pass++;
            });
        }
    }
    for (int s = 0; s < strips; s++)
        for (int64_t m = 0; m < count; m++) p.template emit_at<1, NV>(sums[s] + m, p.row + m, s * NV * W);
}

// So many rows that reading the codes takes no time: sums stay in registers over all inputs.
template <class Form, int BITS, class Scale, int MB, int NV>
void by_columns(const Part<Form>& p, int64_t count) {
    for (int64_t first = 0; first < std::min<int64_t>(PANEL, p.codes.outputs - p.panel * PANEL); first += NV * W) {
        Columns<BITS, Scale> c(p.codes, p.panel, first);
        Ahead ahead(p.codes, p.panel, 1);
        by_tiles<MB>(count, [&](auto rows, int64_t m) {
            V acc[rows.value][NV];
            for (auto& row : acc)
                for (V& each : row) each = zero();
            any_tile<Form, BITS, rows.value, NV>(c, p.spans, p.x, p.row + m, 0, c.groups, ahead, acc);
            p.template emit_at<rows.value, NV>(acc, p.row + m, first);
            ahead.stop();  // all has come
        });
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
        if constexpr (W == 16 && Form::template FOUR_WIDE<BITS>)
            if (count <= 4 && spans.plain) return few_rows<Form, BITS, Scale, 4, 4, 4>(p, count);
        if (count <= FEW_ROWS) return few_rows<Form, BITS, Scale, TILE_ROWS, 2, FEW_ROWS>(p, count);
        many_rows(p, count, scratch);
    };
    // Where reading the weights is what takes time, a thread reads on where it was.
    int64_t together = rows <= FEW_ROWS ? std::max<int64_t>(1, c.panels() / (4 * pool.threads())) : 1;
    pool.run((c.panels() + together - 1) / together * parts, [=, &c](int64_t task, Scratch& scratch) {
        int64_t first = task / parts * together;
        for (int64_t panel = first; panel < std::min(c.panels(), first + together); panel++)
            compute(panel, task % parts, scratch);
    });
}

}  // namespace quire
