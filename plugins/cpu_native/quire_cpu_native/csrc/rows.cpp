// RMS norm with residual, gated activations, what stands between the fused projection and attention, and the largest
// logit of each row.
#include "rows.h"

#include <algorithm>
#include <vector>

#include "pool.h"
#include "recorded.h"

namespace quire {
namespace {

constexpr int64_t SERIAL = 16384;  // elements up to which waking a thread costs more than it saves

// Calls row(index) for every row, several to a task.
template <class Row>
void by_rows(Pool& pool, int64_t rows, int64_t size, const Row& row) {
    int64_t step = std::max<int64_t>(1, SERIAL / std::max<int64_t>(1, size));
    pool.run((rows + step - 1) / step, [&](int64_t task, Scratch&) {
        for (int64_t r = task * step; r < std::min(rows, (task + 1) * step); r++) row(r);
    });
}

template <class T>
void add_row(const T* x, T* residual, int64_t size) {
    int64_t i = 0;
    for (; i + W <= size; i += W) store(residual + i, add(load(residual + i), load(x + i)));
    for (; i < size; i++) put(residual + i, to_float(residual[i]) + to_float(x[i]));
}

template <class T>
void rms_norm(Pool& pool, const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t size, float eps,
              float offset) {
    by_rows(pool, rows, size, [=](int64_t r) {
        if (residual) add_row(x + r * size, residual + r * size, size);
        norm_row((residual ? residual : x) + r * size, weight, out + r * size, size, eps, offset);
    });
}

enum Activation { SILU, GELU, GELU_TANH };

V activated(V x, int64_t kind) {
    if (kind == SILU) return div(x, add(set1(1.0f), exp(sub(zero(), x))));
    if (kind == GELU_TANH) {
        V inner = mul(x, fma(mul(x, x), set1(0.044715f * 0.7978845608f), set1(0.7978845608f)));
        return mul(mul(x, set1(0.5f)), add(set1(1.0f), tanh(inner)));
    }
    float each[W];
    store(each, x);
    for (float& value : each) value = 0.5f * value * (1.0f + erff(value * 0.70710678f));
    return load(each);
}

template <class T>
void gated_act(Pool& pool, const T* x, int64_t ldx, T* out, int64_t rows, int64_t size, int64_t kind) {
    by_rows(pool, rows, 2 * size, [=](int64_t r) {
        const T *gate = x + r * ldx, *up = gate + size;
        T* to = out + r * size;
        int64_t i = 0;
        for (; i + W <= size; i += W) store(to + i, mul(rounded(activated(load(gate + i), kind), to), load(up + i)));
        if (int64_t left = size - i) {
            V value = mul(rounded(activated(load_some(gate + i, left), kind), to), load_some(up + i, left));
            store_some(to + i, value, left);
        }
    });
}

// Everything that does not differ from token to token; fields as in `native.py`.
template <class T>
struct Heads {
    const T *q_weight, *k_weight;  // null: no norm
    int64_t num_heads, num_kv_heads, head_dim, v_head_dim, half, neox;
    float q_eps, k_eps, q_offset, k_offset;
};

template <class T>
void rotate(const float* x, T* out, const float* cos, const float* sin, int64_t half, int64_t size, bool neox) {
    int64_t i = 0;
    if (neox) {
        for (; i + W <= half; i += W) {
            V a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
            store(out + i, sub(mul(a, c), mul(b, s)));
            store(out + half + i, add(mul(b, c), mul(a, s)));
        }
    }
    for (; i < half; i++) {
        int64_t first = neox ? i : 2 * i, second = neox ? half + i : 2 * i + 1;
        float a = x[first], b = x[second];
        put(out + first, a * cos[i] - b * sin[i]);
        put(out + second, b * cos[i] + a * sin[i]);
    }
    for (int64_t rest = 2 * half; rest < size; rest++) put(out + rest, x[rest]);
}

template <class T>
void one_head(const T* x, const T* weight, float eps, float offset, T* out, const float* cos, const float* sin,
              const Heads<T>& h, float* wide) {
    V inverse = set1(weight ? inverse_rms(x, h.head_dim, eps) : 1.0f);
    for (int64_t i = 0; i < h.head_dim; i += W) {
        int64_t left = std::min<int64_t>(W, h.head_dim - i);
        V value = load_some(x + i, left);
        if (weight) value = rounded(normed(value, inverse, load_some(weight + i, left), offset, x), x);
        store_some(wide + i, value, left);
    }
    rotate(wide, out, cos, sin, h.half, h.head_dim, h.neox != 0);
}

// Heads of one token into a cache of the same dtype, or of int8 with a scale for each head, as `quantize_kv` does.
template <class T>
void keep(const T* x, int64_t heads, int64_t size, T* to, float*) {
    memcpy(to, x, heads * size * sizeof(T));
}
template <class T>
void keep(const T* x, int64_t heads, int64_t size, int8_t* to, float* scales) {
    for (int64_t head = 0; head < heads; head++, x += size, to += size) {
        V most = zero(), poison = zero();
        for (int64_t i = 0; i < size; i += W) {
            V value = load_some(x + i, std::min<int64_t>(W, size - i));
            most = max(most, max(value, sub(zero(), value)));
            poison = add(poison, sub(value, value));  // what is no finite number must not get lost
        }
        float top = largest(most) + sum(poison);
        scales[head] = top / 127.0f;
        if (!(top > 1e-30f)) {
            memset(to, 0, size);
            continue;
        }
        for (int64_t i = 0; i < size; i += W) {
            int64_t count = std::min<int64_t>(W, size - i);
            float codes[W];
            store(codes, round_to_even(mul(load_some(x + i, count), set1(127.0f / top))));
            for (int64_t j = 0; j < count; j++) to[i + j] = (int8_t)codes[j];
        }
    }
}

template <class Kept>
struct Slots {
    Kept *keys, *values;
    float *k_scales, *v_scales;  // [slots, Hkv], or null
    const int64_t* of_token;
};

// qkv [T, ..] -> turned [T, Hq + Hkv, D], and keys and values into their slots.
template <class T, class Kept>
void prepare(Pool& pool, const Heads<T>& h, const T* qkv, int64_t ldx, const float* cos, const float* sin,
             const Slots<Kept>& slots, T* turned, int64_t tokens) {
    int64_t heads = h.num_heads + h.num_kv_heads, width = heads * h.head_dim;
    by_rows(pool, tokens, width, [&, heads, width](int64_t t) {
        float wide[1024];
        const T* x = qkv + t * ldx;
        const float *c = cos + t * h.half, *s = sin + t * h.half;
        for (int64_t head = 0; head < heads; head++) {
            bool is_key = head >= h.num_heads;
            T* out = turned + t * width + head * h.head_dim;
            one_head(x + head * h.head_dim, is_key ? h.k_weight : h.q_weight, is_key ? h.k_eps : h.q_eps,
                     is_key ? h.k_offset : h.q_offset, out, c, s, h, wide);
        }
        int64_t first = slots.of_token[t] * h.num_kv_heads;  // head in the cache
        const T* key = turned + t * width + h.num_heads * h.head_dim;
        float* k_scales = slots.k_scales ? slots.k_scales + first : nullptr;
        float* v_scales = slots.v_scales ? slots.v_scales + first : nullptr;
        keep(key, h.num_kv_heads, h.head_dim, slots.keys + first * h.head_dim, k_scales);
        keep(x + width, h.num_kv_heads, h.v_head_dim, slots.values + first * h.v_head_dim, v_scales);
    });
}

// The largest of some numbers, and the first place that it is at; or that one of them is not finite.
struct Largest {
    float value;
    int64_t place;
    bool finite;
};

template <class T>
Largest largest_of(const T* x, int64_t begin, int64_t end) {
    constexpr int64_t SPAN = 32 * W;
    Largest found{-INFINITY, begin, true};
    V odd = zero();  // what is not finite becomes no number here
    int64_t best = begin;
    for (int64_t span = begin; span < end; span += SPAN) {
        V top = set1(-INFINITY);
        int64_t i = span, stop = std::min(end, span + SPAN);
        for (; i + W <= stop; i += W) {
            V value = load(x + i);
            top = max(top, value), odd = add(odd, sub(value, value));
        }
        float most = largest(top);
        for (; i < stop; i++) {
            float value = to_float(x[i]);
            most = std::max(most, value), odd = add(odd, set1(value - value));
        }
        if (most > found.value) found.value = most, best = span;
    }
    found.finite = sum(odd) == 0.0f;
    for (found.place = best; found.place + 1 < end && to_float(x[found.place]) != found.value;) found.place++;
    return found;
}

// x [rows][stride] -> out [rows]: the place of a row's largest element, the first of equals; -1 if one is not finite.
template <class T>
void argmax(Pool& pool, const T* x, int64_t stride, int32_t* out, int64_t rows, int64_t size) {
    const int64_t pieces = (size + SERIAL - 1) / SERIAL;
    std::vector<Largest> found(rows * pieces);
    pool.run(rows * pieces, [=, &found](int64_t task, Scratch&) {
        int64_t begin = task % pieces * SERIAL;
        found[task] = largest_of(x + task / pieces * stride, begin, std::min(size, begin + SERIAL));
    });
    for (int64_t row = 0; row < rows; row++) {
        Largest best = found[row * pieces];
        for (int64_t piece = 1; piece < pieces; piece++) {
            const Largest& next = found[row * pieces + piece];
            best.finite &= next.finite;
            if (next.value > best.value) best.value = next.value, best.place = next.place;
        }
        out[row] = best.finite ? (int32_t)best.place : -1;
    }
}

}  // namespace
}  // namespace quire

using namespace quire;

#define QUIRE_ROWS(T, NAME)                                                                                         \
    extern "C" void quire_rms_norm_##NAME(Pool* pool, const T* x, T* residual, const T* weight, T* out, int64_t rows, \
                                          int64_t size, float eps, float offset) {                                  \
        std::lock_guard<std::mutex> hold(pool->lock());                                                             \
        rms_norm(*pool, x, residual, weight, out, rows, size, eps, offset);                                         \
    }                                                                                                               \
    extern "C" void quire_gated_act_##NAME(Pool* pool, const T* x, int64_t ldx, T* out, int64_t rows, int64_t size, \
                                           int64_t kind) {                                                          \
        std::lock_guard<std::mutex> hold(pool->lock());                                                             \
        gated_act(*pool, x, ldx, out, rows, size, kind);                                                            \
    }                                                                                                               \
    extern "C" void quire_argmax_##NAME(Pool* pool, const T* x, int64_t stride, int32_t* out, int64_t rows,         \
                                        int64_t size) {                                                             \
        std::lock_guard<std::mutex> hold(pool->lock());                                                             \
        argmax(*pool, x, stride, out, rows, size);                                                                  \
    }                                                                                                               \
    QUIRE_RECORDED(quire_rms_norm_##NAME)                                                                           \
    QUIRE_RECORDED(quire_gated_act_##NAME)                                                                          \
    QUIRE_RECORDED(quire_argmax_##NAME)

#define QUIRE_PREPARE(T, Kept, NAME)                                                                                \
    extern "C" void quire_prepare_##NAME(Pool* pool, const void* heads, const T* qkv, int64_t ldx, const float* cos, \
                                         const float* sin, const int64_t* slots, T* turned, Kept* keys,             \
                                         Kept* values, float* k_scales, float* v_scales, int64_t tokens) {          \
        std::lock_guard<std::mutex> hold(pool->lock());                                                             \
        Slots<Kept> into{keys, values, k_scales, v_scales, slots};                                                  \
        prepare(*pool, *(const Heads<T>*)heads, qkv, ldx, cos, sin, into, turned, tokens);                          \
    }                                                                                                               \
    QUIRE_RECORDED(quire_prepare_##NAME)

QUIRE_ROWS(float, f32)
QUIRE_ROWS(bf16, bf16)
QUIRE_PREPARE(float, float, f32)
QUIRE_PREPARE(bf16, bf16, bf16)
QUIRE_PREPARE(float, int8_t, int8_f32)
QUIRE_PREPARE(bf16, int8_t, int8_bf16)
