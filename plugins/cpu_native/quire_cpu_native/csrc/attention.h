// Attention that reads the paged cache in place: q [T, Hq, D], k [blocks, block_size, Hkv, D], v likewise. A cache of
// int8 has a scale for each position and head, [blocks, block_size, Hkv].
//
// The query heads of a KV head, over a few query tokens, form a tile. For each tile keys and values are read in chunks
// of 32 positions. All sums run over absolute positions in one order: within a chunk, over the chunks of a split of 512,
// over splits. Positions that a query does not see add nothing. So a query's bits depend neither on its tile, nor on
// which thread computes which split.
#pragma once
#include <algorithm>
#include <type_traits>

#include "pool.h"
#include "simd.h"

namespace quire {

constexpr int64_t CHUNK = 32, SPLIT = 512, MAX_ROWS = 64;
const float NOTHING = -INFINITY;

// Fields as in `native.py`.
struct Layer {
    int64_t num_heads, num_kv_heads, head_dim, v_head_dim, window, block_size;  // window 0: none
    float scale, softcap;                                                        // softcap 0: none
    const float* sinks;                                                          // [Hq] or null
};

template <class Kept>
struct Cache {
    const Kept* elements;
    const float* scales;  // null: none
};

// T: of queries and results, Kept: of the cache.
template <class T, class Kept>
struct Problem {
    Layer layer;
    const T* q;
    Cache<Kept> keys, values;
    T* out;
    const int32_t* table;
    int64_t table_width, ldq;
};

struct Tile {
    int64_t row, token, position, queries;  // first query's place in the batch and in its request
};

// Running maximum, sum of weights and weighted values of one query head; `values` [Dv].
struct State {
    float top, total;
    float* values;
};

template <class T, class Kept>
class Work {
   public:
    // Memory for rows of queries, a chunk of keys or values, and scores.
    Work(const Problem<T, Kept>& problem, const Tile& tile, int64_t kv_head, Scratch& scratch)
        : p(problem), tile(tile), kv_head(kv_head), group(problem.layer.num_heads / problem.layer.num_kv_heads) {
        const Layer& l = p.layer;
        rows = group * tile.queries;
        size = padded(l.head_dim), v_size = padded(l.v_head_dim);
        float* memory = scratch.floats(MAX_ROWS * (size + 2 * v_size + CHUNK) + CHUNK * std::max(size, v_size));
        queries = memory, chunk = queries + MAX_ROWS * size, scores = chunk + CHUNK * std::max(size, v_size);
        part = scores + MAX_ROWS * CHUNK, whole = part + MAX_ROWS * v_size;
        for (int64_t r = 0; r < rows; r++) widen(query(r), queries + r * size, l.head_dim, size);
    }

    static int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

    int64_t last() const { return tile.position + tile.queries - 1; }
    int64_t first_seen(int64_t position) const {
        return p.layer.window ? std::max<int64_t>(0, position - p.layer.window + 1) : 0;
    }
    int64_t first_split() const { return first_seen(tile.position) / SPLIT; }
    int64_t end_split() const { return last() / SPLIT + 1; }

    // Positions of one split -> states of all rows, from nothing.
    void split(int64_t index, State* states) {
        for (int64_t r = 0; r < rows; r++) {
            states[r].top = NOTHING, states[r].total = 0;
            std::fill(states[r].values, states[r].values + v_size, 0.0f);
        }
        int64_t begin = std::max(index * SPLIT, first_seen(tile.position));
        int64_t end = std::min((index + 1) * SPLIT, last() + 1);
        for (int64_t at = begin / CHUNK * CHUNK; at < end; at += CHUNK)
            one_chunk(at, std::max(begin - at, (int64_t)0), std::min(end - at, CHUNK), states);
    }

    // Adds one split's states to those of the splits before it.
    void merge(State* into, const State* from) const {
        for (int64_t r = 0; r < rows; r++) {
            if (from[r].top == NOTHING) continue;
            float top = std::max(into[r].top, from[r].top);
            float a = into[r].top == NOTHING ? 0.0f : exp1(into[r].top - top), b = exp1(from[r].top - top);
            for (int64_t d = 0; d < v_size; d += W)
                store(into[r].values + d, fma(load(into[r].values + d), set1(a), mul(load(from[r].values + d), set1(b))));
            into[r].total = into[r].total * a + from[r].total * b, into[r].top = top;
        }
    }

    void finish(const State* states) const {
        const Layer& l = p.layer;
        for (int64_t r = 0; r < rows; r++) {
            float total = states[r].total, factor = 1.0f;
            if (l.sinks) {
                float sink = l.sinks[kv_head * group + r % group], top = std::max(states[r].top, sink);
                factor = exp1(states[r].top - top), total = total * factor + exp1(sink - top);
            }
            V inverse = set1(factor / total);
            T* to = p.out + ((tile.token + r / group) * l.num_heads + kv_head * group + r % group) * l.v_head_dim;
            for (int64_t d = 0; d < l.v_head_dim; d += W) {
                V value = mul(load(states[r].values + d), inverse);
                int64_t left = l.v_head_dim - d;
                left >= W ? store(to + d, value) : store_some(to + d, value, left);
            }
        }
    }

    // `rows` states on memory [rows][v_size].
    void place(State* states, float* memory) const {
        for (int64_t r = 0; r < rows; r++) states[r] = {NOTHING, 0.0f, memory + r * v_size};
    }

    float *part, *whole;
    int64_t rows, size, v_size;

   private:
    const T* query(int64_t r) const {
        const Layer& l = p.layer;
        return p.q + (tile.token + r / group) * p.ldq + (kv_head * group + r % group) * l.head_dim;
    }

    static void widen(const T* from, float* to, int64_t count, int64_t size) {
        int64_t d = 0;
        for (; d + W <= count; d += W) store(to + d, load(from + d));
        if (d < size) store(to + d, load_some(from + d, count - d));
    }
    static void widen(const int8_t* from, float scale, float* to, int64_t count, int64_t size) {
        int64_t d = 0;
        for (; d + W <= count; d += W) store(to + d, mul(load(from + d), set1(scale)));
        if (d < size) store(to + d, mul(load_some(from + d, count - d), set1(scale)));
    }

    // A head's elements lie apart from the next position's: the processor does not guess where it goes on.
    static void fetch(const Kept* from, int64_t count) {
#if defined(__GNUC__)
        for (int64_t d = 0; d < count; d += 64 / (int64_t)sizeof(Kept)) __builtin_prefetch(from + d);
#endif
    }

    // Rows `from` to `end` - 1 of a chunk of the cache, as floats [CHUNK][padded].
    void read(const Cache<Kept>& cache, int64_t dim, int64_t at, int64_t from, int64_t end,
              const Kept* next = nullptr, int64_t next_dim = 0) {
        const Layer& l = p.layer;
        const int32_t* table = p.table + tile.row * p.table_width;
        int64_t wide = padded(dim);
        for (int64_t j = from; j < end; j++) {
            int64_t position = at + j, slot = table[position / l.block_size] * l.block_size + position % l.block_size;
            int64_t head = slot * l.num_kv_heads + kv_head;
            if (next) fetch(next + head * next_dim, next_dim);
            if constexpr (sizeof(Kept) == 1)
                widen(cache.elements + head * dim, cache.scales[head], chunk + j * wide, dim, wide);
            else
                widen(cache.elements + head * dim, chunk + j * wide, dim, wide);
        }
    }

    void one_chunk(int64_t at, int64_t from, int64_t end, State* states) {
        read(p.keys, p.layer.head_dim, at, from, end, p.values.elements, p.layer.v_head_dim);
        by_fours([&](auto some, int64_t r) { score<some.value>(r, from, end); });
        for (int64_t r = 0; r < rows; r++) weigh(r, at, from, end, states[r]);
        read(p.values, p.layer.v_head_dim, at, from, end);
        by_fours([&](auto some, int64_t r) { gather<some.value>(r, from, end, states); });
    }

    // Calls work(how many rows, the first of them): four at a time, then two, then one.
    template <class Rows>
    void by_fours(const Rows& work) const {
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) work(std::integral_constant<int, 4>{}, r);
        if (r + 2 <= rows) work(std::integral_constant<int, 2>{}, r), r += 2;
        if (r < rows) work(std::integral_constant<int, 1>{}, r);
    }

    // Eight sums at a time: one would wait for its own last addition.
    template <int R>
    void score(int64_t r, int64_t from, int64_t end) {
        constexpr int J = 8 / R;
        int64_t j = from;
        for (; j + J <= end; j += J) dots<R, J>(r, j);
        for (; j < end; j++) dots<R, 1>(r, j);
    }

    // Scores of R rows with J positions.
    template <int R, int J>
    void dots(int64_t r, int64_t j) {
        V dot[R][J] = {};
        for (int64_t d = 0; d < size; d += W) {
            V key[J];
            for (int c = 0; c < J; c++) key[c] = load(chunk + (j + c) * size + d);
            for (int i = 0; i < R; i++) {
                V query = load(queries + (r + i) * size + d);
                for (int c = 0; c < J; c++) dot[i][c] = fma(query, key[c], dot[i][c]);
            }
        }
        for (int i = 0; i < R; i++)
            for (int c = 0; c < J; c++) scores[(r + i) * CHUNK + j + c] = sum(dot[i][c]);
    }

    // Scores of one row -> weights relative to its new maximum; what it had is scaled down.
    void weigh(int64_t r, int64_t at, int64_t from, int64_t end, State& state) {
        const Layer& l = p.layer;
        float* s = scores + r * CHUNK;
        int64_t position = tile.position + r / group;
        int64_t low = std::max(from, first_seen(position) - at), high = std::min(end, position + 1 - at);
        for (int64_t j = 0; j < CHUNK; j += W) {
            V value = mul(load(s + j), set1(l.scale));
            if (l.softcap != 0.0f) value = mul(tanh(div(value, set1(l.softcap))), set1(l.softcap));
            store(s + j, value);
        }
        for (int64_t j = 0; j < CHUNK; j++)
            if (j < low || j >= high) s[j] = NOTHING;
        if (low >= high) {  // sees nothing here
            std::fill(s, s + CHUNK, 0.0f);
            return;
        }
        V best = load(s);
        for (int64_t j = W; j < CHUNK; j += W) best = max(load(s + j), best);
        float top = std::max(state.top, largest(best)), keep = state.top == NOTHING ? 0.0f : exp1(state.top - top);
        V total = zero();
        for (int64_t j = 0; j < CHUNK; j += W) store(s + j, exp(sub(load(s + j), set1(top))));
        for (int64_t j = 0; j < CHUNK; j++)
            if (j < low || j >= high) s[j] = 0.0f;
        for (int64_t j = 0; j < CHUNK; j += W) total = add(total, load(s + j));
        state.total = state.total * keep + sum(total), state.top = top;
        for (int64_t d = 0; d < v_size; d += W) store(state.values + d, mul(load(state.values + d), set1(keep)));
    }

    template <int R>
    void gather(int64_t r, int64_t from, int64_t end, State* states) {
        for (int64_t d = 0; d < v_size; d += 2 * W) {
            bool two = d + W < v_size;
            V sums[R][2];
            for (int i = 0; i < R; i++) {
                sums[i][0] = load(states[r + i].values + d);
                sums[i][1] = two ? load(states[r + i].values + d + W) : zero();
            }
            for (int64_t j = from; j < end; j++) {
                V first = load(chunk + j * v_size + d), second = two ? load(chunk + j * v_size + d + W) : zero();
                for (int i = 0; i < R; i++) {
                    V weight = set1(scores[(r + i) * CHUNK + j]);
                    sums[i][0] = fma(weight, first, sums[i][0]), sums[i][1] = fma(weight, second, sums[i][1]);
                }
            }
            for (int i = 0; i < R; i++) {
                store(states[r + i].values + d, sums[i][0]);
                if (two) store(states[r + i].values + d + W, sums[i][1]);
            }
        }
    }

    const Problem<T, Kept>& p;
    const Tile& tile;
    int64_t kv_head, group;
    float *queries, *chunk, *scores;
};

}  // namespace quire
