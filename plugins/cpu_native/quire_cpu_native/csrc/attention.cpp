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

// Heads of a tile go together, as far as their rows find room, but at most `together`.
std::vector<Part> parts_of(const std::vector<Tile>& tiles, const Layer& layer, int64_t together) {
    int64_t heads = layer.num_kv_heads, group = layer.num_heads / heads;
    std::vector<Part> parts;
    // The last tile of a request sees the most: it comes first.
    for (int64_t t = (int64_t)tiles.size() - 1; t >= 0; t--) {
        int64_t some = std::max<int64_t>(1, std::min(together, MAX_ROWS / (group * tiles[t].queries)));
        for (int64_t head = 0; head < heads; head += some)
            parts.push_back({t, head, std::min(some, heads - head)});
    }
    return parts;
}

template <class T, class Kept>
void whole_parts(Pool& pool, const Problem<T, Kept>& problem, const std::vector<Tile>& tiles,
                 const std::vector<Part>& parts) {
    pool.run((int64_t)parts.size(), [&](int64_t task, Scratch& scratch) {
        const Tile& tile = tiles[parts[task].tile];
        Work<T, Kept> work(problem, tile, parts[task], scratch);
        State one[MAX_ROWS], whole[MAX_ROWS];
        work.place(one, work.one), work.place(whole, work.whole);
        int64_t first = problem.first_split(tile), end = tile.end_split();
        work.split(first, whole);  // as if merged with nothing
        for (int64_t s = first + 1; s < end; s++) work.split(s, one), work.merge(whole, one);
        work.finish(whole);
    });
}

// Each split is a task of its own; one more round puts them together.
template <class T, class Kept>
void split_parts(Pool& pool, const Problem<T, Kept>& problem, const std::vector<Tile>& tiles,
                 const std::vector<Part>& parts) {
    struct Piece {
        int64_t part, split;
    };
    std::vector<Piece> pieces;
    std::vector<int64_t> begins;
    for (const Part& part : parts) {
        begins.push_back((int64_t)pieces.size());
        for (int64_t s = problem.first_split(tiles[part.tile]); s < tiles[part.tile].end_split(); s++)
            pieces.push_back({(int64_t)begins.size() - 1, s});
    }
    begins.push_back((int64_t)pieces.size());
    std::vector<State> states(pieces.size() * MAX_ROWS);
    int64_t v_size = Work<T, Kept>::padded(problem.layer.v_head_dim);
    float* memory = pool.shared(pieces.size() * MAX_ROWS * v_size);
    pool.run((int64_t)pieces.size(), [&, v_size](int64_t task, Scratch& scratch) {
        const Part& part = parts[pieces[task].part];
        Work<T, Kept> work(problem, tiles[part.tile], part, scratch);
        State* own = &states[task * MAX_ROWS];
        work.place(own, memory + task * MAX_ROWS * v_size);
        work.split(pieces[task].split, own);
    });
    pool.run((int64_t)parts.size(), [&](int64_t task, Scratch& scratch) {
        Work<T, Kept> work(problem, tiles[parts[task].tile], parts[task], scratch);
        State whole[MAX_ROWS];
        work.place(whole, work.whole);
        std::fill(work.whole, work.whole + work.rows * work.v_size, 0.0f);
        for (int64_t piece = begins[task]; piece < begins[task + 1]; piece++)
            work.merge(whole, &states[piece * MAX_ROWS]);
        work.finish(whole);
    });
}

// As many heads together as leave enough tasks for every thread: what lies side by side is read at once.
template <class T, class Kept>
void attend(Pool& pool, const Problem<T, Kept>& problem, const int32_t* starts, const int32_t* lengths, int64_t num_rows) {
    auto tiles = tiles_of(starts, lengths, num_rows, std::max<int64_t>(1, MAX_ROWS / problem.group()));
    if (tiles.empty()) return;
    const Layer& layer = problem.layer;
    int64_t heads = layer.num_kv_heads, enough = 4 * pool.threads(), num_tiles = (int64_t)tiles.size(), splits = 0;
    for (const Tile& tile : tiles) splits += tile.end_split() - problem.first_split(tile);
    if (splits == num_tiles || (int64_t)parts_of(tiles, layer, heads).size() >= enough)
        whole_parts(pool, problem, tiles, parts_of(tiles, layer, num_tiles * heads / enough));
    else
        split_parts(pool, problem, tiles, parts_of(tiles, layer, splits * heads / enough));
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
