// Which tiles there are, and who computes them.
#include "attention.h"
#include "recorded.h"

#include <cstring>
#include <vector>

namespace quire {
namespace {

std::vector<Tile> tiles_of(const int32_t* starts, const int32_t* lengths, int64_t num_rows, int64_t most) {
    std::vector<Tile> tiles;
    for (int64_t row = 0; row < num_rows; row++) {
        int64_t count = starts[row + 1] - starts[row], before = lengths[row] - count;
        for (int64_t first = 0; first < count; first += most)
            tiles.push_back({row, starts[row] + first, before + first, std::min(most, count - first)});
    }
    return tiles;
}

// Heads of a tile go together as far as their rows find room and enough tasks are left for every thread.
std::vector<Part> parts_of(const std::vector<Tile>& tiles, const Layer& layer, int64_t threads) {
    int64_t heads = layer.num_kv_heads, group = layer.num_heads / heads;
    int64_t most = std::max<int64_t>(1, (int64_t)tiles.size() * heads / (4 * threads));
    std::vector<Part> parts;
    // The last tile of a request sees the most: it comes first.
    for (int64_t t = (int64_t)tiles.size() - 1; t >= 0; t--) {
        int64_t together = std::max<int64_t>(1, std::min(most, MAX_ROWS / (group * tiles[t].queries)));
        for (int64_t head = 0; head < heads; head += together)
            parts.push_back({t, head, std::min(together, heads - head)});
    }
    return parts;
}

template <class T, class Kept>
void whole_tiles(Pool& pool, const Problem<T, Kept>& problem, const std::vector<Tile>& tiles) {
    auto parts = parts_of(tiles, problem.layer, pool.threads());
    pool.run((int64_t)parts.size(), [&](int64_t task, Scratch& scratch) {
        Work<T, Kept> work(problem, tiles[parts[task].tile], parts[task], scratch);
        State one[MAX_ROWS], whole[MAX_ROWS];
        work.place(one, work.one), work.place(whole, work.whole);
        int64_t first = work.first_split(), end = work.end_split();
        work.split(first, whole);  // as if merged with nothing
        for (int64_t s = first + 1; s < end; s++) work.split(s, one), work.merge(whole, one);
        work.finish(whole);
    });
}

// Each split is a task of its own; one more round puts them together.
template <class T, class Kept>
void split_tiles(Pool& pool, const Problem<T, Kept>& problem, const std::vector<Tile>& tiles) {
    struct Piece {
        int64_t tile, split;
    };
    int64_t heads = problem.layer.num_kv_heads, v_size = Work<T, Kept>::padded(problem.layer.v_head_dim);
    std::vector<Piece> pieces;
    std::vector<int64_t> begins;
    for (int64_t t = 0; t < (int64_t)tiles.size(); t++) {
        Scratch unused;
        Work<T, Kept> work(problem, tiles[t], {t, 0, 1}, unused);
        begins.push_back((int64_t)pieces.size());
        for (int64_t s = work.first_split(); s < work.end_split(); s++) pieces.push_back({t, s});
    }
    begins.push_back((int64_t)pieces.size());
    std::vector<State> states(pieces.size() * heads * MAX_ROWS);
    float* memory = pool.shared(pieces.size() * heads * MAX_ROWS * v_size);
    pool.run((int64_t)pieces.size() * heads, [&, heads, v_size](int64_t task, Scratch& scratch) {
        int64_t tile = pieces[task / heads].tile;
        Work<T, Kept> work(problem, tiles[tile], {tile, task % heads, 1}, scratch);
        State* own = &states[task * MAX_ROWS];
        work.place(own, memory + task * MAX_ROWS * v_size);
        work.split(pieces[task / heads].split, own);
    });
    pool.run((int64_t)tiles.size() * heads, [&, heads](int64_t task, Scratch& scratch) {
        int64_t tile = task / heads, head = task % heads;
        Work<T, Kept> work(problem, tiles[tile], {tile, head, 1}, scratch);
        State whole[MAX_ROWS];
        work.place(whole, work.whole);
        std::fill(work.whole, work.whole + work.rows * work.v_size, 0.0f);
        for (int64_t piece = begins[tile]; piece < begins[tile + 1]; piece++)
            work.merge(whole, &states[(piece * heads + head) * MAX_ROWS]);
        work.finish(whole);
    });
}

template <class T, class Kept>
void attend(Pool& pool, const Problem<T, Kept>& problem, const int32_t* starts, const int32_t* lengths, int64_t num_rows) {
    auto tiles = tiles_of(starts, lengths, num_rows, std::max<int64_t>(1, MAX_ROWS / problem.group()));
    if (tiles.empty()) return;
    if ((int64_t)tiles.size() * problem.layer.num_kv_heads < 4 * pool.threads())
        split_tiles(pool, problem, tiles);
    else
        whole_tiles(pool, problem, tiles);
}

// Tokens behind the last row's must stay finite.
template <class T, class Kept>
void clear_padding(const Problem<T, Kept>& problem, int64_t first, int64_t end) {
    int64_t width = problem.layer.num_heads * problem.layer.v_head_dim;
    if (first < end) memset(problem.out + first * width, 0, (end - first) * width * sizeof(T));
}

}  // namespace
}  // namespace quire

using namespace quire;

#define QUIRE_ATTENTION(T, Kept, NAME)                                                                                \
    extern "C" void quire_attention_##NAME(Pool* pool, const void* layer, const T* q, int64_t ldq, const Kept* keys,  \
                                           const Kept* values, const float* k_scales, const float* v_scales, T* out,  \
                                           const int32_t* table, int64_t table_width, const int32_t* starts,          \
                                           const int32_t* lengths, int64_t num_rows, int64_t num_tokens) {            \
        std::lock_guard<std::mutex> hold(pool->lock());                                                               \
        Cache<Kept> k{keys, k_scales}, v{values, v_scales};                                                           \
        Problem<T, Kept> problem{*(const Layer*)layer, q, k, v, out, table, table_width, ldq};                        \
        attend(*pool, problem, starts, lengths, num_rows);                                                            \
        clear_padding(problem, starts[num_rows], num_tokens);                                                         \
    }                                                                                                                 \
    QUIRE_RECORDED(quire_attention_##NAME)

QUIRE_ATTENTION(float, float, f32)
QUIRE_ATTENTION(bf16, bf16, bf16)
QUIRE_ATTENTION(float, int8_t, int8_f32)
QUIRE_ATTENTION(bf16, int8_t, int8_bf16)
