// Attention that reads the paged cache in place: q [T, Hq, D], k [blocks, block_size, Hkv, D], v likewise.
//
// The query heads of a KV head, over a few query tokens, form a tile. For each tile keys and values are read in chunks
// of 32 positions. All sums run over absolute positions in one order: within a chunk, over the chunks of a split of 512,
// over splits. Positions that a query does not see add nothing. So a query's bits depend neither on its tile, nor on
// which thread computes which split.
#include <algorithm>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace quire {
namespace {

constexpr int64_t CHUNK = 32, SPLIT = 512, MAX_ROWS = 64;
const float NOTHING = -INFINITY;

// Fields as in `native.py`.
struct Layer {
    int64_t num_heads, num_kv_heads, head_dim, v_head_dim, window, block_size;  // window 0: none
    float scale, softcap;                                                        // softcap 0: none
    const float* sinks;                                                          // [Hq] or null
};

template <class T>
struct Problem {
    Layer layer;
    const T *q, *keys, *values;
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

template <class T>
class Work {
   public:
    // Memory for rows of queries, a chunk of keys or values, and scores.
    Work(const Problem<T>& problem, const Tile& tile, int64_t kv_head, Scratch& scratch)
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

    // Rows `from` to `end` - 1 of a chunk of the cache, as floats [CHUNK][padded].
    void read(const T* cache, int64_t dim, int64_t at, int64_t from, int64_t end) {
        const Layer& l = p.layer;
        const int32_t* table = p.table + tile.row * p.table_width;
        int64_t wide = padded(dim);
        for (int64_t j = from; j < end; j++) {
            int64_t position = at + j, slot = table[position / l.block_size] * l.block_size + position % l.block_size;
            widen(cache + (slot * l.num_kv_heads + kv_head) * dim, chunk + j * wide, dim, wide);
        }
    }

    void one_chunk(int64_t at, int64_t from, int64_t end, State* states) {
        read(p.keys, p.layer.head_dim, at, from, end);
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) score<4>(r, from, end);
        for (; r < rows; r++) score<1>(r, from, end);
        for (r = 0; r < rows; r++) weigh(r, at, from, end, states[r]);
        read(p.values, p.layer.v_head_dim, at, from, end);
        r = 0;
        for (; r + 4 <= rows; r += 4) gather<4>(r, from, end, states);
        for (; r < rows; r++) gather<1>(r, from, end, states);
    }

    template <int R>
    void score(int64_t r, int64_t from, int64_t end) {
        for (int64_t j = from; j < end; j++) {
            V dot[R] = {};
            for (int64_t d = 0; d < size; d += W) {
                V key = load(chunk + j * size + d);
                for (int i = 0; i < R; i++) dot[i] = fma(load(queries + (r + i) * size + d), key, dot[i]);
            }
            for (int i = 0; i < R; i++) scores[(r + i) * CHUNK + j] = sum(dot[i]);
        }
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

    const Problem<T>& p;
    const Tile& tile;
    int64_t kv_head, group;
    float *queries, *chunk, *scores;
};

std::vector<Tile> tiles_of(const int32_t* starts, const int32_t* lengths, int64_t num_rows, int64_t most) {
    std::vector<Tile> tiles;
    for (int64_t row = 0; row < num_rows; row++) {
        int64_t count = starts[row + 1] - starts[row], before = lengths[row] - count;
        for (int64_t first = 0; first < count; first += most)
            tiles.push_back({row, starts[row] + first, before + first, std::min(most, count - first)});
    }
    return tiles;
}

template <class T>
void whole_tiles(Pool& pool, const Problem<T>& problem, const std::vector<Tile>& tiles) {
    int64_t heads = problem.layer.num_kv_heads;
    pool.run((int64_t)tiles.size() * heads, [&, heads](int64_t task, Scratch& scratch) {
        // The last tile of a request sees the most: it comes first.
        Work<T> work(problem, tiles[tiles.size() - 1 - task / heads], task % heads, scratch);
        State part[MAX_ROWS], whole[MAX_ROWS];
        work.place(part, work.part), work.place(whole, work.whole);
        std::fill(work.whole, work.whole + work.rows * work.v_size, 0.0f);
        for (int64_t s = work.first_split(); s < work.end_split(); s++) work.split(s, part), work.merge(whole, part);
        work.finish(whole);
    });
}

// Each split is a task of its own; one more round puts them together.
template <class T>
void split_tiles(Pool& pool, const Problem<T>& problem, const std::vector<Tile>& tiles) {
    struct Part {
        int64_t tile, split;
    };
    int64_t heads = problem.layer.num_kv_heads, v_size = Work<T>::padded(problem.layer.v_head_dim);
    std::vector<Part> parts;
    std::vector<int64_t> begins;
    for (int64_t t = 0; t < (int64_t)tiles.size(); t++) {
        Scratch unused;
        Work<T> work(problem, tiles[t], 0, unused);
        begins.push_back((int64_t)parts.size());
        for (int64_t s = work.first_split(); s < work.end_split(); s++) parts.push_back({t, s});
    }
    begins.push_back((int64_t)parts.size());
    std::vector<State> states(parts.size() * heads * MAX_ROWS);
    float* memory = pool.shared(parts.size() * heads * MAX_ROWS * v_size);
    pool.run((int64_t)parts.size() * heads, [&, heads, v_size](int64_t task, Scratch& scratch) {
        Work<T> work(problem, tiles[parts[task / heads].tile], task % heads, scratch);
        State* own = &states[task * MAX_ROWS];
        work.place(own, memory + task * MAX_ROWS * v_size);
        work.split(parts[task / heads].split, own);
    });
    pool.run((int64_t)tiles.size() * heads, [&, heads](int64_t task, Scratch& scratch) {
        int64_t tile = task / heads, head = task % heads;
        Work<T> work(problem, tiles[tile], head, scratch);
        State whole[MAX_ROWS];
        work.place(whole, work.whole);
        std::fill(work.whole, work.whole + work.rows * work.v_size, 0.0f);
        for (int64_t part = begins[tile]; part < begins[tile + 1]; part++)
            work.merge(whole, &states[(part * heads + head) * MAX_ROWS]);
        work.finish(whole);
    });
}

template <class T>
void attend(Pool& pool, const Problem<T>& problem, const int32_t* starts, const int32_t* lengths, int64_t num_rows) {
    int64_t group = problem.layer.num_heads / problem.layer.num_kv_heads;
    auto tiles = tiles_of(starts, lengths, num_rows, std::max<int64_t>(1, MAX_ROWS / group));
    if (tiles.empty()) return;
    if ((int64_t)tiles.size() * problem.layer.num_kv_heads < 4 * pool.threads())
        split_tiles(pool, problem, tiles);
    else
        whole_tiles(pool, problem, tiles);
}

}  // namespace
}  // namespace quire

using namespace quire;

#define QUIRE_ATTENTION(T, NAME)                                                                                      \
    extern "C" void quire_attention_##NAME(Pool* pool, const void* layer, const T* q, int64_t ldq, const T* keys,     \
                                           const T* values, T* out, const int32_t* table, int64_t table_width,        \
                                           const int32_t* starts, const int32_t* lengths, int64_t num_rows) {         \
        std::lock_guard<std::mutex> hold(pool->lock());                                                               \
        Problem<T> problem{*(const Layer*)layer, q, keys, values, out, table, table_width, ldq};                      \
        attend(*pool, problem, starts, lengths, num_rows);                                                            \
    }

QUIRE_ATTENTION(float, f32)
QUIRE_ATTENTION(bf16, bf16)
