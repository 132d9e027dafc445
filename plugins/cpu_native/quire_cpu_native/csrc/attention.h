// Attention that reads the paged cache in place: q [T, Hq, D], k [blocks, block_size, Hkv, D], v likewise. A cache of
// int8 has a scale for each position and head, [blocks, block_size, Hkv].
//
// The query heads of a KV head, over a few query tokens, form a tile. All sums run over absolute positions in one order:
// within a split of 256, then over the splits. Keys and values of a split are read in pieces of 32 positions, first all
// keys, then all values; in between scores become weights. Positions that a query does not see add nothing. So a query's
// bits depend neither on its tile, nor on which thread computes which split.
#pragma once
#include "floats.h"
#include "pairs.h"
#include "pool.h"

namespace quire {

constexpr int64_t SPLIT = 256, MAX_ROWS = 64, AHEAD_HEADS = 2;
const float NOTHING = -INFINITY;

// How queries meet keys, and weights meet values.
template <class T, class Kept>
struct ProductsOf {
    using type = Floats<T, Kept>;
};
#if defined(QUIRE_ISA_AVX512BF16)
template <>
struct ProductsOf<bf16, bf16> {
    using type = Pairs;
};
#endif

// Fields as in `native.py`.
struct Layer {
    int64_t num_heads, num_kv_heads, head_dim, v_head_dim, window, block_size;  // window 0: none
    float scale, softcap;                                                        // softcap 0: none
    const float* sinks;                                                          // [Hq] or null
};

struct Tile {
    int64_t row, token, position, queries;  // first query's place in the batch and in its request

    int64_t end() const { return position + queries; }
    int64_t end_split() const { return (end() - 1) / SPLIT + 1; }
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
    int64_t first_seen(int64_t position) const {
        return layer.window ? std::max<int64_t>(0, position - layer.window + 1) : 0;
    }
    int64_t first_split(const Tile& tile) const { return first_seen(tile.position) / SPLIT; }
};

// KV heads `head` to `head` + `heads` - 1 of a tile. Its rows are the first head's, then the next one's.
struct Part {
    int64_t tile, head, heads;
};

template <class T, class Kept>
class Work {
   public:
    // Memory for rows of queries, a piece of keys or values, scores of a split, and states.
    Work(const Problem<T, Kept>& problem, const Tile& tile, const Part& part, Scratch& scratch)
        : p(problem), tile(tile), head(part.head), heads(part.heads), group(problem.group()) {
        const Layer& l = p.layer;
        rows_of_head = group * tile.queries, rows = rows_of_head * heads;
        int64_t size = padded(l.head_dim);
        v_size = padded(l.v_head_dim);
        float* memory = scratch.floats(MAX_ROWS * (size + 2 * v_size + SPLIT) + PIECE * std::max(size, v_size));
        one = memory, whole = one + MAX_ROWS * v_size, scores = whole + MAX_ROWS * v_size;
        float* queries = scores + MAX_ROWS * SPLIT;
        products = {queries, queries + MAX_ROWS * size, l.head_dim, l.v_head_dim, size, v_size};
        for (int64_t r = 0; r < rows; r++) products.take_query(r, p.q + query(r));
    }

    static int64_t padded(int64_t n) { return (n + Products::UNIT - 1) / Products::UNIT * Products::UNIT; }

    // Positions of one split -> states of all rows, from nothing.
    void split(int64_t index, State* states) {
        at = index * SPLIT;
        from = std::max(p.first_seen(tile.position) - at, (int64_t)0), end = std::min(tile.end() - at, SPLIT);
        find_places();
        if (!fetched) fetch_first();
        // Heads take turns, as they lie side by side in the cache.
        for (int64_t j = from / PIECE * PIECE; j < end; j += PIECE)
            for (int64_t h = 0; h < heads; h++) score(h, j);
        for (int64_t r = 0; r < rows; r++) weigh(r, states[r]);
        for (int64_t j = from / PIECE * PIECE; j < end; j += PIECE)
            for (int64_t h = 0; h < heads; h++) gather(h, j, states + h * rows_of_head);
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
            products.put_in_order(states[r].values);
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
    int64_t rows, v_size;

   private:
    using Products = typename ProductsOf<T, Kept>::type;

    int64_t query_head(int64_t r) const { return (head + r / rows_of_head) * group + r % group; }
    int64_t token(int64_t r) const { return tile.token + r % rows_of_head / group; }
    int64_t query(int64_t r) const { return token(r) * p.ldq + query_head(r) * p.layer.head_dim; }

    // Where the first head's elements of a split's positions lie, counted in heads.
    void find_places() {
        const Layer& l = p.layer;
        const int32_t* table = p.table + tile.row * p.table_width;
        int64_t block = (at + from) / l.block_size, inside = (at + from) % l.block_size;
        known = std::min(tile.end() - at, SPLIT + PIECE);
        for (int64_t j = from; j < known; j++) {
            places[j] = (table[block] * l.block_size + inside) * l.num_kv_heads + head;
            if (++inside == l.block_size) inside = 0, block++;
        }
    }

    // Behind the last position of the split that row r of a head's sees, or one of the three beside it, which are
    // multiplied together with it.
    int64_t row_end(int64_t r) const { return std::min(end, tile.position + (r / 4 * 4 + 3) / group + 1 - at); }

    // Scores of a head's rows with a piece's keys, that of the positions from j on.
    void score(int64_t h, int64_t j) {
        int64_t begin = std::max(from - j, (int64_t)0), stop = std::min(end - j, PIECE);
        auto behind = [&](int64_t i) QUIRE_INLINE { fetch_behind_key(h, j + i); };
        products.take_keys(p.keys, places + j, h, begin, stop, behind);
        by_fours([&](auto some, int64_t r) {
            int64_t row = h * rows_of_head + r;
            products.template score<some.value>(row, scores + row * SPLIT + j, SPLIT, std::min(stop, row_end(r) - j));
        });
    }

    void gather(int64_t h, int64_t j, State* states) {
        int64_t begin = std::max(from - j, (int64_t)0), stop = std::min(end - j, PIECE);
        auto behind = [&](int64_t i) QUIRE_INLINE { fetch_behind_value(h, j + i); };
        products.take_values(p.values, places + j, h, begin, stop, behind);
        by_fours([&](auto some, int64_t r) {
            const Weight* weights = (const Weight*)(scores + (h * rows_of_head + r) * SPLIT) + j;
            int64_t apart = SPLIT * sizeof(float) / sizeof(Weight);
            products.template gather<some.value>(weights, apart, begin, std::min(stop, row_end(r) - j), states + r);
        });
    }

    // Calls work(how many of a head's rows, the first of them): four at a time, then two, then one.
    template <class Rows>
    void by_fours(const Rows& work) const {
        int64_t r = 0;
        for (; r + 4 <= rows_of_head; r += 4) work(std::integral_constant<int, 4>{}, r);
        if (r + 2 <= rows_of_head) work(std::integral_constant<int, 2>{}, r), r += 2;
        if (r < rows_of_head) work(std::integral_constant<int, 1>{}, r);
    }

    // What is read two heads later is fetched, as the processor does not guess it: a head's elements lie apart from the
    // next position's. Behind a split's keys its values are read, and then the next one's keys.
    QUIRE_INLINE void fetch_behind_key(int64_t h, int64_t j) const {
        for (h += AHEAD_HEADS; h >= heads; h -= heads) j += PIECE;
        if (j < end) return fetch_key(h, j);
        if ((j += from - end) < end) fetch_value(h, j);
    }
    QUIRE_INLINE void fetch_behind_value(int64_t h, int64_t j) const {
        for (h += AHEAD_HEADS; h >= heads; h -= heads) j += PIECE;
        if (j < end) return fetch_value(h, j);
        if (j < known) fetch_key(h, j);
    }
    // What nobody has fetched.
    void fetch_first() {
        for (int64_t h = 0; h < std::min(AHEAD_HEADS, heads); h++)
            for (int64_t j = from; j < std::min(end, PIECE); j++) fetch_key(h, j);
        fetched = true;
    }
    QUIRE_INLINE void fetch_key(int64_t h, int64_t j) const {
        int64_t dim = p.layer.head_dim;
        fetch(p.keys.elements + (places[j] + h) * dim, dim);
    }
    QUIRE_INLINE void fetch_value(int64_t h, int64_t j) const {
        int64_t dim = p.layer.v_head_dim;
        fetch(p.values.elements + (places[j] + h) * dim, dim);
    }
    // Into the second cache: what is fetched before it is used does not push out of the first what is used now.
    QUIRE_INLINE static void fetch(const Kept* from, int64_t count) {
        for (int64_t d = 0; d < count; d += 64 / (int64_t)sizeof(Kept)) fetch_later(from + d);
    }

    // Scores of a row -> weights relative to its largest, in their place, and an empty sum of values.
    void weigh(int64_t row, State& state) {
        const Layer& l = p.layer;
        float* s = scores + row * SPLIT;
        Weight* weights = (Weight*)s;
        int64_t r = row % rows_of_head, position = tile.position + r / group;
        int64_t low = std::max(from, p.first_seen(position) - at), high = std::min(end, position + 1 - at);
        int64_t first = from / PIECE * PIECE, stop = std::max(first, (row_end(r) + PIECE - 1) / PIECE * PIECE);
        state.top = NOTHING, state.total = 0.0f;
        std::fill(state.values, state.values + v_size, 0.0f);
        if (low >= high) return std::fill(weights + first, weights + stop, Weight(0));  // sees nothing here
        std::fill(s + first, s + low, s[low]), std::fill(s + high, s + stop, s[low]);
        for (int64_t j = first; l.softcap != 0.0f && j < stop; j += W)
            store(s + j, mul(tanh(div(mul(load(s + j), set1(l.scale)), set1(l.softcap))), set1(l.softcap)));
        float scale = l.softcap != 0.0f ? 1.0f : l.scale;
        V best = mul(load(s + first), set1(scale));
        for (int64_t j = first + W; j < stop; j += W) best = max(mul(load(s + j), set1(scale)), best);
        state.top = largest(best);
        products.weigh(s, first, stop, scale, state.top);
        std::fill(weights + first, weights + low, Weight(0)), std::fill(weights + high, weights + stop, Weight(0));
        state.total = products.total(weights + first, weights + stop);
    }

    using Weight = typename Products::Weight;
    const Problem<T, Kept>& p;
    const Tile& tile;
    int64_t head, heads, group, rows_of_head;
    Products products;
    float* scores;          // [rows][SPLIT]; then weights in the first half or all of each row
    int64_t at, from, end;  // of a split: its first position, and which it reads, counted from there
    bool fetched = false;
    int64_t known, places[SPLIT + PIECE];
};

}  // namespace quire
