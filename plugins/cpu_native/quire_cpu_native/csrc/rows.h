// What is computed row by row: norms and rotations.
#pragma once
#include "simd.h"

namespace quire {

// Rounds to T and back: values that models hold in their compute dtype.
static inline V rounded(V x, const float*) { return x; }
static inline V rounded(V x, const bf16*) {
    bf16 kept[W];
    store(kept, x);
    return load(kept);
}

// 1 / sqrt(mean of squares + eps)
template <class T>
static inline float inverse_rms(const T* x, int64_t size, float eps) {
    V squares = zero();
    int64_t i = 0;
    for (; i + W <= size; i += W) {
        V value = load(x + i);
        squares = fma(value, value, squares);
    }
    if (i < size) {
        V value = load_some(x + i, size - i);
        squares = fma(value, value, squares);
    }
    return 1.0f / sqrtf(sum(squares) / (float)size + eps);
}

// One vector of a norm. Gemma adds 1 to the weight and rounds once, others round before the product as well.
template <class T>
static inline V normed(V x, V inverse, V weight, float offset, const T* dtype) {
    V scaled = mul(x, inverse);
    if (offset != 0.0f) return mul(scaled, add(weight, set1(offset)));
    return mul(rounded(scaled, dtype), weight);
}

template <class T>
static inline void norm_row(const T* x, const T* weight, T* out, int64_t size, float eps, float offset) {
    V inverse = set1(inverse_rms(x, size, eps));
    int64_t i = 0;
    for (; i + W <= size; i += W) store(out + i, normed(load(x + i), inverse, load(weight + i), offset, x));
    if (int64_t left = size - i)
        store_some(out + i, normed(load_some(x + i, left), inverse, load_some(weight + i, left), offset, x), left);
}

}  // namespace quire
