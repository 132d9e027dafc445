// Queries, keys and values as floats, whatever they are kept as.
#pragma once
#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace quire {

constexpr int64_t PIECE = 32;  // positions whose keys or values are unpacked at a time

template <class Kept>
struct Cache {
    const Kept* elements;
    const float* scales;  // null: none
};

// Running maximum, sum of weights and weighted values of one query head; `values` [Dv].
struct State {
    float top, total;
    float* values;
};

// A piece's keys or values are those of `places` [PIECE], h heads behind the one that these tell. Only those from `begin`
// to `stop` - 1 are read; `fetch` is called before each.
template <class T, class Kept>
class Floats {
   public:
    static constexpr int64_t UNIT = W;  // sizes are padded to whole ones
    using Weight = float;

    float *queries, *piece;  // [rows][size], [PIECE][size or v_size]
    int64_t dim, v_dim;      // of keys and values
    int64_t size, v_size;    // the same, padded

    void take_query(int64_t r, const T* from) { widen(from, nullptr, queries + r * size, dim, size); }
    template <class Fetch>
    void take_keys(const Cache<Kept>& cache, const int64_t* places, int64_t h, int64_t begin, int64_t stop,
                   const Fetch& fetch) {
        read(cache, places, h, begin, stop, dim, size, fetch);
    }
    template <class Fetch>
    void take_values(const Cache<Kept>& cache, const int64_t* places, int64_t h, int64_t begin, int64_t stop,
                     const Fetch& fetch) {
        read(cache, places, h, begin, stop, v_dim, v_size, fetch);
    }

    // Scores of R rows with the piece up to `stop`; `to` [R][apart]. As many sums at a time as `sums` takes: one would
    // wait for its own last addition. Scores of what was not read are written too, and are not looked at.
    template <int R>
    void score(int64_t r, float* to, int64_t apart, int64_t stop) const {
        constexpr int J = TOGETHER / R;
        for (int64_t j = 0; j < stop; j += J) dots<R, J>(queries + r * size, to + j, apart, j);
    }

    // Scores -> weights relative to the largest, `top`.
    void weigh(float* s, int64_t first, int64_t stop, float scale, float top) const {
        for (int64_t j = first; j < stop; j += W) store(s + j, exp(sub(mul(load(s + j), set1(scale)), set1(top))));
    }
    float total(const float* first, const float* stop) const {
        V all = zero();
        for (; first < stop; first += W) all = add(all, load(first));
        return sum(all);
    }

    // As many vectors of values at a time as find room in registers. `weights` [R][apart].
    template <int R>
    void gather(const float* weights, int64_t apart, int64_t begin, int64_t stop, State* states) const {
        constexpr int NV = W == 16 ? 4 : 2;
        int64_t d = 0;
        for (; d + NV * W <= v_size; d += NV * W) add_values<R, NV>(weights, apart, begin, stop, states, d);
        for (; d < v_size; d += W) add_values<R, 1>(weights, apart, begin, stop, states, d);
    }
    void put_in_order(float*) const {}

   private:
    template <class From>
    static void widen(const From* from, const float* scale, float* to, int64_t count, int64_t size) {
        auto whole = [&](V x) { return scale ? mul(x, set1(*scale)) : x; };
        int64_t d = 0;
        for (; d + W <= count; d += W) store(to + d, whole(load(from + d)));
        if (d < size) store(to + d, whole(load_some(from + d, count - d)));
    }

    template <class Fetch>
    void read(const Cache<Kept>& cache, const int64_t* places, int64_t h, int64_t begin, int64_t stop, int64_t count,
              int64_t wide, const Fetch& fetch) {
        for (int64_t j = begin; j < stop; j++) {
            fetch(j);
            int64_t place = places[j] + h;
            const float* scale = sizeof(Kept) == 1 ? cache.scales + place : nullptr;
            widen(cache.elements + place * count, scale, piece + j * wide, count, wide);
        }
    }

    // Scores of R rows with the J positions from j on.
    template <int R, int J>
    void dots(const float* first, float* to, int64_t apart, int64_t j) const {
        V dot[R * J] = {};
        for (int64_t d = 0; d < size; d += W) {
            V key[J];
#pragma GCC unroll 8
            for (int c = 0; c < J; c++) key[c] = load(piece + (j + c) * size + d);
#pragma GCC unroll 8
            for (int i = 0; i < R; i++) {
                V query = load(first + i * size + d);
#pragma GCC unroll 8
                for (int c = 0; c < J; c++) dot[i * J + c] = fma(query, key[c], dot[i * J + c]);
            }
        }
        float all[R * J];
        sums(dot, all);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) memcpy(to + i * apart, all + i * J, J * sizeof(float));
    }

    template <int R, int NV>
    void add_values(const float* weights, int64_t apart, int64_t begin, int64_t stop, State* states, int64_t d) const {
        V sums[R][NV];
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) sums[i][v] = load(states[i].values + d + v * W);
        for (int64_t j = begin; j < stop; j++) {
            V one[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) one[v] = load(piece + j * v_size + d + v * W);
#pragma GCC unroll 8
            for (int i = 0; i < R; i++) {
                V weight = set1(weights[i * apart + j]);
#pragma GCC unroll 8
                for (int v = 0; v < NV; v++) sums[i][v] = fma(weight, one[v], sums[i][v]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
#pragma GCC unroll 8
            for (int v = 0; v < NV; v++) store(states[i].values + d + v * W, sums[i][v]);
    }
};

}  // namespace quire
