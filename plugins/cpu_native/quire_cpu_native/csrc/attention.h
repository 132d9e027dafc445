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

// Whether queries and keys are multiplied as they are, in pairs.
template <class T, class Kept>
#if defined(QUIRE_ISA_AVX512BF16)
constexpr bool IN_PAIRS = std::is_same<T, bf16>::value && std::is_same<Kept, bf16>::value;
#else
constexpr bool IN_PAIRS = false;
#endif

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

    int64_t group() const { return layer.num_heads / layer.num_kv_heads; }
};

struct Tile {
    int64_t row, token, position, queries;  // first query's place in the batch and in its request
};

// KV heads `head` to `head` + `heads` - 1 of a tile. Its rows are the first head's, then the next one's.
struct Part {
    int64_t tile, head, heads;
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
    Work(const Problem<T, Kept>& problem, const Tile& tile, const Part& part, Scratch& scratch)
        : p(problem), tile(tile), head(part.head), heads(part.heads), group(problem.group()) {
        const Layer& l = p.layer;
        rows_of_head = group * tile.queries, rows = rows_of_head * heads;
        size = padded(l.head_dim), v_size = padded(l.v_head_dim), paired = (l.head_dim + 2 * W - 1) / (2 * W) * 2 * W;
        float* memory = scratch.floats(MAX_ROWS * (size + 2 * v_size + CHUNK) + CHUNK * std::max(size, v_size));
        queries = memory, chunk = queries + MAX_ROWS * size, scores = chunk + CHUNK * std::max(size, v_size);
        one = scores + MAX_ROWS * CHUNK, whole = one + MAX_ROWS * v_size;
        for (int64_t r = 0; r < rows; r++) {
            if constexpr (IN_PAIRS<T, Kept>)
                pad(p.q + query(r), (bf16*)queries + r * paired, l.head_dim);
            else
                widen(p.q + query(r), queries + r * size, l.head_dim, size);
        }
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
        // Heads take turns, as they lie side by side in the cache.
        for (int64_t at = begin / CHUNK * CHUNK; at < end; at += CHUNK) {
            int64_t from = std::max(begin - at, (int64_t)0), some = std::min(end - at, CHUNK);
            find_places(at, from, some);
            for (int64_t h = 0; h < heads; h++) one_chunk(h, at, from, some, states + h * rows_of_head);
        }
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
                float sink = l.sinks[query_head(r)], top = std::max(states[r].top, sink);
                factor = exp1(states[r].top - top), total = total * factor + exp1(sink - top);
            }
            V inverse = set1(factor / total);
            T* to = p.out + (token(r) * l.num_heads + query_head(r)) * l.v_head_dim;
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

    float *one, *whole;  // memory for states of a split, and of all
    int64_t rows, size, v_size;

   private:
    int64_t query_head(int64_t r) const { return (head + r / rows_of_head) * group + r % group; }
    int64_t token(int64_t r) const { return tile.token + r % rows_of_head / group; }
    int64_t query(int64_t r) const { return token(r) * p.ldq + query_head(r) * p.layer.head_dim; }

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

    void pad(const bf16* from, bf16* to, int64_t count) const {
        memcpy(to, from, count * sizeof(bf16)), memset(to + count, 0, (paired - count) * sizeof(bf16));
    }

    // Where the first head's elements of a chunk's positions lie, counted in heads.
    void find_places(int64_t at, int64_t from, int64_t end) {
        const Layer& l = p.layer;
        const int32_t* table = p.table + tile.row * p.table_width;
        int64_t block = (at + from) / l.block_size, inside = (at + from) % l.block_size;
        for (int64_t j = from; j < end; j++) {
            places[j] = (table[block] * l.block_size + inside) * l.num_kv_heads + head;
            if (++inside == l.block_size) inside = 0, block++;
        }
    }

    // A head's elements lie apart from the next position's: the processor does not guess where it goes on. Into the second
    // cache: what is fetched before it is used does not push out of the first what is used now.
    static void fetch(const Kept* from, int64_t count) {
#if defined(__GNUC__)
        for (int64_t d = 0; d < count; d += 64 / (int64_t)sizeof(Kept)) __builtin_prefetch(from + d, 0, 2);
#endif
    }

    // Rows `from` to `end` - 1 of a chunk of the cache, as floats [CHUNK][padded]; meanwhile what is read next is fetched.
    void read(const Cache<Kept>& cache, int64_t dim, int64_t h, int64_t from, int64_t end, const Kept* next,
              int64_t next_dim) {
        int64_t wide = padded(dim);
        for (int64_t j = from; j < end; j++) {
            int64_t place = places[j] + h;
            fetch(next + place * next_dim, next_dim);
            if constexpr (sizeof(Kept) == 1)
                widen(cache.elements + place * dim, cache.scales[place], chunk + j * wide, dim, wide);
            else
                widen(cache.elements + place * dim, chunk + j * wide, dim, wide);
        }
    }

    // Addresses of a chunk's keys: in the cache, or of copies where they are no whole vectors. Values are fetched meanwhile.
    void find_keys(int64_t h, int64_t from, int64_t end) {
        int64_t dim = p.layer.head_dim, v_dim = p.layer.v_head_dim;
        for (int64_t j = from; j < end; j++) {
            int64_t place = places[j] + h;
            fetch(p.values.elements + place * v_dim, v_dim);
            keys[j] = (const bf16*)p.keys.elements + place * dim;
            if (dim == paired) continue;
            bf16* copy = (bf16*)chunk + j * paired;
            pad(keys[j], copy, dim), keys[j] = copy;
        }
        std::fill(keys, keys + from, keys[from]), std::fill(keys + end, keys + CHUNK, keys[from]);
    }

    void one_chunk(int64_t h, int64_t at, int64_t from, int64_t end, State* states) {
        const Layer& l = p.layer;
        if constexpr (IN_PAIRS<T, Kept>) {
            find_keys(h, from, end);
            const bf16* first = (const bf16*)queries + h * rows_of_head * paired;
            by_fours([&](auto some, int64_t r) { score<some.value>(first + r * paired, r, from, end); });
        } else {
            const float* first = queries + h * rows_of_head * size;
            read(p.keys, l.head_dim, h, from, end, p.values.elements, l.v_head_dim);
            by_fours([&](auto some, int64_t r) { score<some.value>(first + r * size, r, from, end); });
        }
        for (int64_t r = 0; r < rows_of_head; r++) weigh(r, at, from, end, states[r]);
        const Kept* next = p.keys.elements + l.head_dim;  // of the next head
        if constexpr (sizeof(Kept) > 1) {
            if (rows_of_head <= 4 && l.v_head_dim == v_size) {  // used too seldom to be worth a copy
                const Kept* values[CHUNK];
                for (int64_t j = from; j < end; j++) {
                    fetch(next + (places[j] + h) * l.head_dim, l.head_dim);
                    values[j] = p.values.elements + (places[j] + h) * l.v_head_dim;
                }
                auto value = [&](int64_t j, int64_t d) { return load(values[j] + d); };
                return by_fours([&](auto some, int64_t r) { gather<some.value>(r, from, end, states, value); });
            }
        }
        read(p.values, l.v_head_dim, h, from, end, next, l.head_dim);
        auto value = [&](int64_t j, int64_t d) { return load(chunk + j * v_size + d); };
        by_fours([&](auto some, int64_t r) { gather<some.value>(r, from, end, states, value); });
    }

    // Calls work(how many rows, the first of them): four at a time, then two, then one.
    template <class Rows>
    void by_fours(const Rows& work) const {
        int64_t r = 0;
        for (; r + 4 <= rows_of_head; r += 4) work(std::integral_constant<int, 4>{}, r);
        if (r + 2 <= rows_of_head) work(std::integral_constant<int, 2>{}, r), r += 2;
        if (r < rows_of_head) work(std::integral_constant<int, 1>{}, r);
    }

    // As many sums at a time as `sums` takes: one would wait for its own last addition. What lies before `from` or behind
    // `end` in the chunk is left over from another, and is not looked at.
    template <int R, class Query>
    void score(const Query* queries, int64_t r, int64_t from, int64_t end) {
        constexpr int J = TOGETHER / R;
        for (int64_t j = from / J * J; j < end; j += J) dots<R, J>(queries, scores + r * CHUNK + j, j);
    }

    // Scores of R rows with the J positions from j on.
    template <int R, int J>
    void dots(const float* queries, float* to, int64_t j) const {
        V dot[R * J] = {};
        for (int64_t d = 0; d < size; d += W) {
            V key[J];
            for (int c = 0; c < J; c++) key[c] = load(chunk + (j + c) * size + d);
            for (int i = 0; i < R; i++) {
                V query = load(queries + i * size + d);
                for (int c = 0; c < J; c++) dot[i * J + c] = fma(query, key[c], dot[i * J + c]);
            }
        }
        float all[R * J];
        sums(dot, all);
        for (int i = 0; i < R; i++) memcpy(to + i * CHUNK, all + i * J, J * sizeof(float));
    }

#if defined(QUIRE_ISA_AVX512BF16)
    template <int R, int J>
    void dots(const bf16* queries, float* to, int64_t j) const {
        V dot[R * J] = {};
        for (int64_t d = 0; d < paired; d += 2 * W) {
            __m512bh query[R];
            for (int i = 0; i < R; i++) memcpy(&query[i], queries + i * paired + d, sizeof query[i]);
            for (int c = 0; c < J; c++) {
                __m512bh key;
                memcpy(&key, keys[j + c] + d, sizeof key);
                for (int i = 0; i < R; i++) dot[i * J + c] = _mm512_dpbf16_ps(dot[i * J + c], query[i], key);
            }
        }
        float all[R * J];
        sums(dot, all);
        for (int i = 0; i < R; i++) memcpy(to + i * CHUNK, all + i * J, J * sizeof(float));
    }
#endif

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
        if (low >= high) {  // sees nothing here
            std::fill(s, s + CHUNK, 0.0f);
            return;
        }
        std::fill(s, s + low, NOTHING), std::fill(s + high, s + CHUNK, NOTHING);
        V best = load(s);
        for (int64_t j = W; j < CHUNK; j += W) best = max(load(s + j), best);
        float top = std::max(state.top, largest(best)), keep = 1.0f;
        if (top != state.top) keep = state.top == NOTHING ? 0.0f : exp1(state.top - top);
        V total = zero();
        for (int64_t j = 0; j < CHUNK; j += W) store(s + j, exp(sub(load(s + j), set1(top))));
        std::fill(s, s + low, 0.0f), std::fill(s + high, s + CHUNK, 0.0f);
        for (int64_t j = 0; j < CHUNK; j += W) total = add(total, load(s + j));
        state.total = state.total * keep + sum(total), state.top = top;
        for (int64_t d = 0; keep != 1.0f && d < v_size; d += W)
            store(state.values + d, mul(load(state.values + d), set1(keep)));
    }

    // As many vectors of values at a time as find room in registers. value(j, d): a vector of position j's.
    template <int R, class Value>
    void gather(int64_t r, int64_t from, int64_t end, State* states, const Value& value) {
        constexpr int NV = W == 16 ? 4 : 2;
        int64_t d = 0;
        for (; d + NV * W <= v_size; d += NV * W) add_values<R, NV>(r, from, end, states, d, value);
        for (; d < v_size; d += W) add_values<R, 1>(r, from, end, states, d, value);
    }

    template <int R, int NV, class Value>
    void add_values(int64_t r, int64_t from, int64_t end, State* states, int64_t d, const Value& value) {
        V sums[R][NV];
        for (int i = 0; i < R; i++)
            for (int v = 0; v < NV; v++) sums[i][v] = load(states[r + i].values + d + v * W);
        for (int64_t j = from; j < end; j++) {
            V one[NV];
            for (int v = 0; v < NV; v++) one[v] = value(j, d + v * W);
            for (int i = 0; i < R; i++) {
                V weight = set1(scores[(r + i) * CHUNK + j]);
                for (int v = 0; v < NV; v++) sums[i][v] = fma(weight, one[v], sums[i][v]);
            }
        }
        for (int i = 0; i < R; i++)
            for (int v = 0; v < NV; v++) store(states[r + i].values + d + v * W, sums[i][v]);
    }

    const Problem<T, Kept>& p;
    const Tile& tile;
    int64_t head, heads, group, rows_of_head;
    int64_t paired;  // elements of a query or key, padded to whole vectors of pairs
    float *queries, *chunk, *scores;
    int64_t places[CHUNK];
    const bf16* keys[CHUNK];
};

}  // namespace quire
