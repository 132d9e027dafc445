// Runs every kernel on numbers that are the same everywhere, and writes the results to stdout, so that two builds can be
// compared bit for bit. What calls the system's erf is left out.
#include <array>
#include <cstdio>
#include <vector>

#include "attention.h"
#include "codes.h"

using namespace quire;

// Fields as in `native.py`.
struct Heads {
    const void *q_weight, *k_weight;
    int64_t num_heads, num_kv_heads, head_dim, v_head_dim, half, neox;
    float q_eps, k_eps, q_offset, k_offset;
};
#define OF_DTYPE(T, NAME)                                                                                              \
    extern "C" void quire_linear_pack_##NAME(Pool*, const T*, T*, int64_t, int64_t);                                   \
    extern "C" void quire_linear_##NAME(Pool*, const T*, const T*, const T*, int64_t, T*, int64_t, int64_t, int64_t);  \
    extern "C" void quire_rms_norm_##NAME(Pool*, const T*, T*, const T*, T*, int64_t, int64_t, float, float);          \
    extern "C" void quire_gated_act_##NAME(Pool*, const T*, int64_t, T*, int64_t, int64_t, int64_t);                   \
    extern "C" void quire_argmax_##NAME(Pool*, const T*, int64_t, int32_t*, int64_t, int64_t);                         \
    extern "C" void quire_choose_##NAME(Pool*, const T*, int64_t, int64_t, int64_t, const float*, const int32_t*,      \
                                        const float*, const float*, const int64_t*, const int64_t*, int32_t*);         \
    static constexpr auto choose(T*) { return quire_choose_##NAME; }                                                   \
    extern "C" void quire_codes_linear_##NAME(Pool*, const void*, const T*, const T*, int64_t, T*, int64_t);           \
    static void pack(Pool* pool, const T* weight, T* packed, int64_t outputs, int64_t inputs) {                        \
        quire_linear_pack_##NAME(pool, weight, packed, outputs, inputs);                                               \
    }                                                                                                                  \
    static void multiply(Pool* pool, const T* w, const T* b, const T* x, T* out, int64_t rows, int64_t n, int64_t k) { \
        quire_linear_##NAME(pool, w, b, x, k, out, rows, n, k);                                                        \
    }                                                                                                                  \
    static void rms_norm(Pool* pool, const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t size) {   \
        quire_rms_norm_##NAME(pool, x, residual, weight, out, rows, size, 1e-6f, 1.0f);                                \
    }                                                                                                                  \
    static void gated_act(Pool* pool, const T* x, T* out, int64_t rows, int64_t size, int64_t kind) {                  \
        quire_gated_act_##NAME(pool, x, 2 * size, out, rows, size, kind);                                              \
    }                                                                                                                  \
    static void argmax(Pool* pool, const T* x, int32_t* out, int64_t rows, int64_t size) {                             \
        quire_argmax_##NAME(pool, x, size, out, rows, size);                                                           \
    }

#define OF_CACHE(T, Kept, NAME)                                                                                       \
    extern "C" void quire_prepare_##NAME(Pool*, const void*, const T*, int64_t, const float*, const float*,           \
                                         const int64_t*, T*, Kept*, Kept*, float*, float*, int64_t);                  \
    extern "C" void quire_attention_##NAME(Pool*, const void*, const T*, int64_t, const Kept*, const Kept*,           \
                                           const float*, const float*, T*, const int32_t*, int64_t, const int32_t*,   \
                                           const int32_t*, int64_t, int64_t);                                         \
    static constexpr auto prepare(T*, Kept*) { return quire_prepare_##NAME; }                                         \
    static constexpr auto attention(T*, Kept*) { return quire_attention_##NAME; }

OF_DTYPE(float, f32)
OF_DTYPE(bf16, bf16)
OF_CACHE(float, float, f32)
OF_CACHE(bf16, bf16, bf16)
OF_CACHE(float, int8_t, int8_f32)
OF_CACHE(bf16, int8_t, int8_bf16)
extern "C" void quire_codes_pack(Pool*, const void*, const uint8_t*, uint8_t*);
extern "C" void quire_codes_weight(Pool*, const void*, float*);
extern "C" void quire_codes_linear_a8_bf16(Pool*, const void*, const bf16*, const bf16*, int64_t, bf16*, int64_t);
extern "C" void quire_gather(Pool*, const char*, int64_t, int64_t, const int64_t*, int64_t, char*, int64_t*);
extern "C" void quire_scatter(Pool*, char*, int64_t, int64_t, const int64_t*, int64_t, const char*, int64_t*);
extern "C" void quire_read_rows(Pool*, const int64_t*, int64_t, int64_t, int64_t, int64_t, char*, int64_t*);
extern "C" void quire_widen(Pool*, const int32_t*, int64_t, int64_t*);
extern "C" void quire_at_least(Pool*, const int32_t*, int64_t, int64_t, int32_t*);
extern "C" void quire_sample(Pool*, const float*, int64_t, int64_t, int64_t, const float*, const int32_t*, const float*,
                             const float*, const int64_t*, const int64_t*, int64_t*);

namespace {

uint64_t state = 1;
uint32_t random_bits() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33);
}
float random_float() { return (float)((int32_t)(random_bits() % 2001) - 1000) / 256.0f; }

template <class T>
std::vector<T> floats(int64_t count) {
    std::vector<T> out(count);
    for (T& each : out) put(&each, random_float());
    return out;
}
std::vector<uint8_t> codes_of(int64_t count, int bits) {
    std::vector<uint8_t> out(count);
    for (uint8_t& each : out) each = (uint8_t)(random_bits() >> 8 & ((1 << bits) - 1));
    return out;
}
std::vector<int8_t> small_numbers(int64_t count) {
    std::vector<int8_t> out(count);
    for (int8_t& each : out) each = (int8_t)(random_bits() % 255 - 127);
    return out;
}

// What is no number has other bits on other processors.
float plain(float x) { return x == x ? x : 12345.0f; }
bf16 plain(bf16 x) { return to_float(x) == to_float(x) ? x : (bf16)0x1234; }
template <class T>
T plain(T x) { return x; }
template <class T>
void write(const std::vector<T>& values) {
    for (T each : values) {
        T it = plain(each);
        fwrite(&it, sizeof it, 1, stdout);
    }
}

template <class T>
void linears(Pool* pool) {
    const std::array<int64_t, 3> sizes[] = {{1, 64, 64}, {1, 130, 7}, {3, 200, 129}, {5, 96, 300}, {17, 70, 61}, {40, 512, 128}};
    for (auto [rows, outputs, inputs] : sizes) {
        auto weight = floats<T>(outputs * inputs), x = floats<T>(rows * inputs), bias = floats<T>(outputs);
        std::vector<T> packed((outputs + PANEL - 1) / PANEL * PANEL * (inputs + 1)), out(rows * outputs);
        pack(pool, weight.data(), packed.data(), outputs, inputs);
        multiply(pool, packed.data(), bias.data(), x.data(), out.data(), rows, outputs, inputs);
        write(out);
        x[0] = bias[0], put(&x[rows * inputs - 1], INFINITY);
        multiply(pool, packed.data(), (const T*)nullptr, x.data(), out.data(), rows, outputs, inputs);
        write(out);
    }
}

void codes(Pool* pool, int bits, bool zeros) {
    const std::array<int64_t, 4> sizes[] = {{1, 64, 64, 32}, {3, 70, 96, 24}, {9, 130, 128, 128}, {33, 200, 256, 64}, {2, 64, 40, 40}};
    for (auto [rows, outputs, inputs, group] : sizes) {
        Codes c{nullptr, nullptr, nullptr, outputs, inputs, bits, group, 0, (float)(1 << (bits - 1))};
        std::vector<uint8_t> packed(c.panels() * PANEL * c.depth() * bits / 8);
        auto scales = floats<float>(c.panels() * c.groups() * PANEL), points = scales;
        for (float& each : points) each = (float)(random_bits() >> 8 & ((1 << bits) - 1));
        c.codes = packed.data(), c.scales = scales.data(), c.zeros = zeros ? points.data() : nullptr;
        quire_codes_pack(pool, &c, codes_of(outputs * inputs, bits).data(), packed.data());
        std::vector<uint16_t> halves(scales.size());
        for (uint16_t& each : halves) each = (uint16_t)(random_bits() % 0x7c00);  // finite, some subnormal
        for (c.half_scales = 0; c.half_scales < 2; c.half_scales++) {
            if (c.half_scales) c.scales = halves.data();
            auto x = floats<float>(rows * inputs), bias = floats<float>(outputs);
            auto small = floats<bf16>(rows * inputs), added = floats<bf16>(outputs);
            std::vector<float> out(rows * outputs), weight(outputs * inputs);
            std::vector<bf16> other(rows * outputs);
            quire_codes_weight(pool, &c, weight.data()), write(weight);
            quire_codes_linear_f32(pool, &c, bias.data(), x.data(), inputs, out.data(), rows), write(out);
            quire_codes_linear_bf16(pool, &c, added.data(), small.data(), inputs, other.data(), rows), write(other);
            quire_codes_linear_a8_bf16(pool, &c, nullptr, small.data(), inputs, other.data(), rows), write(other);
        }
    }
}

template <class T>
void rows_of(Pool* pool) {
    for (int64_t size : {8, 100, 1024}) {
        auto x = floats<T>(6 * size), residual = floats<T>(3 * size), weight = floats<T>(size);
        std::vector<T> out(3 * size);
        rms_norm(pool, x.data(), residual.data(), weight.data(), out.data(), 3, size);
        write(out), write(residual);
        for (int64_t kind : {0, 2}) gated_act(pool, x.data(), out.data(), 3, size, kind), write(out);  // silu, gelu_tanh
    }
    for (int64_t size : {1, 100, 40000}) {
        auto x = floats<T>(2 * size);
        std::vector<int32_t> places(2);
        argmax(pool, x.data(), places.data(), 2, size), write(places);
    }
}

template <class T, class Kept>
void heads(Pool* pool, bool scaled, int64_t window, float softcap, bool with_sinks) {
    const int64_t tokens = 37, block = 16, blocks = 60, width = 50;
    for (auto [size, num_heads, num_kv_heads] : {std::array<int64_t, 3>{64, 4, 2}, std::array<int64_t, 3>{20, 3, 1}}) {
        int64_t row = (num_heads + 2 * num_kv_heads) * size, kept = blocks * block * num_kv_heads;
        auto qkv = floats<T>(tokens * row), q_weight = floats<T>(size), k_weight = floats<T>(size);
        auto cos = floats<float>(tokens * size / 2), sin = floats<float>(tokens * size / 2), sinks = floats<float>(8);
        std::vector<T> turned(tokens * (num_heads + num_kv_heads) * size), out(tokens * num_heads * size);
        std::vector<Kept> keys(kept * size), values(kept * size);
        if constexpr (sizeof(Kept) == 1)
            keys = small_numbers(keys.size()), values = small_numbers(values.size());
        else
            keys = floats<Kept>(keys.size()), values = floats<Kept>(values.size());
        auto k_scales = floats<float>(kept), v_scales = floats<float>(kept);
        std::vector<int64_t> slots(tokens);
        for (int64_t t = 0; t < tokens; t++) slots[t] = 900 - 3 * t;
        Heads fields{q_weight.data(), k_weight.data(), num_heads, num_kv_heads, size, size, size / 2, window == 0,
                     1e-6f,           1e-6f,           0.0f,      0.0f};
        float *k_factors = scaled ? k_scales.data() : nullptr, *v_factors = scaled ? v_scales.data() : nullptr;
        prepare((T*)nullptr, (Kept*)nullptr)(pool, &fields, qkv.data(), row, cos.data(), sin.data(), slots.data(),
                                             turned.data(), keys.data(), values.data(), k_factors, v_factors, tokens);
        write(turned), write(keys), write(values), write(k_scales), write(v_scales);

        std::vector<int32_t> table(3 * width), starts{0, 16, 17, 37}, lengths{700, 1, 20};
        for (int32_t& each : table) each = (int32_t)(random_bits() % blocks);
        Layer layer{num_heads, num_kv_heads, size, size, window, block, 0.125f, softcap, with_sinks ? sinks.data() : nullptr};
        attention((T*)nullptr, (Kept*)nullptr)(pool, &layer, turned.data(), (num_heads + num_kv_heads) * size, keys.data(), values.data(),
                                               k_factors, v_factors, out.data(), table.data(), width, starts.data(),
                                               lengths.data(), 3, tokens);
        write(out);
    }
}

void moves(Pool* pool) {
    const std::vector<int64_t> index{3, 0, 3, 6}, beyond{1, 7};
    std::vector<char> rows(7 * 5), out(4 * 5), back(7 * 5);
    for (char& each : rows) each = (char)random_bits();
    FILE* file = tmpfile();
    fwrite(rows.data(), 1, rows.size(), file), fflush(file);
    std::vector<int64_t> failed(3), wide(4);
    quire_gather(pool, rows.data(), 7, 5, index.data(), 4, out.data(), &failed[0]), write(out);
    quire_scatter(pool, back.data(), 7, 5, index.data(), 4, out.data(), &failed[0]), write(back);
    quire_read_rows(pool, index.data(), 4, fileno(file), 0, 5, out.data(), &failed[0]), write(out);
    quire_gather(pool, rows.data(), 7, 5, beyond.data(), 2, out.data(), &failed[1]);
    quire_scatter(pool, back.data(), 7, 5, beyond.data(), 2, out.data(), &failed[1]), write(back);
    quire_read_rows(pool, beyond.data(), 2, fileno(file), 0, 5, out.data(), &failed[2]), write(failed);
    fclose(file);
    std::vector<int32_t> numbers{-5, 3, -1, 2000000000};
    quire_widen(pool, numbers.data(), 4, wide.data()), write(wide);
    quire_at_least(pool, numbers.data(), 4, -2, numbers.data()), write(numbers);
}

void samples(Pool* pool) {
    const int64_t rows = 64, vocab = 1000;
    auto logits = floats<float>(rows * vocab);
    std::vector<float> temperature(rows), top_p(rows), min_p(rows);
    std::vector<int32_t> top_k(rows);
    std::vector<int64_t> seeds(rows), positions(rows), tokens(rows);
    for (int64_t row = 0; row < rows; row++) {
        temperature[row] = (float)(row % 4) / 2.0f, top_p[row] = row % 3 ? 1.0f : 0.7f;
        min_p[row] = row % 5 ? 0.0f : 0.05f, top_k[row] = row % 2 ? 0 : (int32_t)(1 + row);
        seeds[row] = 7 * row - 9, positions[row] = row * row;
    }
    quire_sample(pool, logits.data(), vocab, rows, vocab, temperature.data(), top_k.data(), top_p.data(), min_p.data(),
                 seeds.data(), positions.data(), tokens.data());
    write(tokens);
    auto narrow = floats<bf16>(rows * vocab);
    std::vector<int32_t> chosen(rows);
    logits[5 * vocab] = NAN, put(&narrow[7 * vocab - 1], INFINITY);
    choose((float*)nullptr)(pool, logits.data(), vocab, rows, vocab, temperature.data(), top_k.data(), top_p.data(),
                            min_p.data(), seeds.data(), positions.data(), chosen.data());
    write(chosen);
    choose((bf16*)nullptr)(pool, narrow.data(), vocab, rows, vocab, temperature.data(), top_k.data(), top_p.data(),
                           min_p.data(), seeds.data(), positions.data(), chosen.data());
    write(chosen);
}

}  // namespace

int main() {
    Pool threads(2), *pool = &threads;
    linears<float>(pool), linears<bf16>(pool);
    for (int bits : {4, 6, 8})
        for (bool zeros : {false, true}) codes(pool, bits, zeros);
    rows_of<float>(pool), rows_of<bf16>(pool);
    heads<float, float>(pool, false, 0, 0.0f, false), heads<bf16, bf16>(pool, false, 33, 5.0f, true);
    heads<float, int8_t>(pool, true, 33, 0.0f, true), heads<bf16, int8_t>(pool, true, 0, 5.0f, false);
    samples(pool), moves(pool);
    return 0;
}
