// One draw for each row of logits, as `quire.sampling.sampler` defines it: temperature, top-k, top-p, min-p, and the
// token whose stretch of the cumulative weights holds the row's Philox draw (Salmon et al. 2011).
//
// Everything is computed in double and summed in the same order as there, so that a row's token is the reference's
// unless its draw falls within a rounding error of the border between two tokens.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "pool.h"
#include "recorded.h"
#include "simd.h"

namespace quire {
namespace {

// Per row.
struct Sampling {
    const float *temperature, *top_p, *min_p;
    const int32_t* top_k;
    const int64_t *seeds, *positions;
    int64_t vocab;
};

// e^x for x <= 0 to about one unit in the last place, 0 below e^-708. Taylor to x^13 in |x| <= ln 2 / 2. Without a
// branch, so that the compiler makes vectors of it.
inline double exp_of(double x) {
    constexpr double MAGIC = 6755399441055744.0;  // 1.5 · 2^52: what is added to it is rounded to whole numbers
    double bounded = x < -709.0 ? -709.0 : x;  // 2^-1023 below has the bits of 0
    double shifted = bounded * 1.4426950408889634 + MAGIC, n = shifted - MAGIC;
    double r = bounded - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    uint64_t bits;
    memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52;  // the whole number stands in the low bits
    double power;
    memcpy(&power, &bits, 8);
    return p * power;
}

// float64 in [0, 1), as `seeded_uniform`.
double uniform(uint64_t seed, uint64_t position) {
    uint32_t c[4] = {(uint32_t)position, (uint32_t)(position >> 32), 0, 0};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a};
        memcpy(c, next, sizeof c);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (double)((uint64_t)(c[0] >> 5) * (1u << 26) + (c[1] >> 6)) / 9007199254740992.0;
}

// The largest logit, and whether all are numbers below infinity; two loops that the compiler makes vectors of.
bool largest_of(const float* logits, int64_t count, float& top) {
    constexpr int LANES = 32;
    float best[LANES], odd[LANES] = {};
    std::fill(best, best + LANES, -INFINITY);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) {
            float x = logits[i + j];
            best[j] = x > best[j] ? x : best[j];
            odd[j] = x < INFINITY ? odd[j] : 1.0f;
        }
    for (; i < count; i++) best[0] = std::max(best[0], logits[i]), odd[0] = logits[i] < INFINITY ? odd[0] : 1.0f;
    top = *std::max_element(best, best + LANES);
    return top > -INFINITY && std::count(odd, odd + LANES, 0.0f) == LANES;
}

// The k-th largest of n numbers, 0 < k < n. At least k are not below the k-th largest of the spans' maxima.
float kth_largest(const float* x, int64_t n, int64_t k) {
    constexpr int64_t SPAN = 64;
    std::vector<float> few;
    float bound = -INFINITY;
    if (n / SPAN > k) {
        for (int64_t i = 0; i + SPAN <= n; i += SPAN) {
            float best[8];
            memcpy(best, x + i, sizeof best);
            for (int64_t j = 8; j < SPAN; j += 8)
                for (int l = 0; l < 8; l++) best[l] = x[i + j + l] > best[l] ? x[i + j + l] : best[l];
            few.push_back(*std::max_element(best, best + 8));
        }
        std::nth_element(few.begin(), few.begin() + k - 1, few.end(), std::greater<float>());
        bound = few[k - 1];
        few.clear();
    }
    for (int64_t i = 0; i < n; i++)
        if (x[i] >= bound) few.push_back(x[i]);
    std::nth_element(few.begin(), few.begin() + k - 1, few.end(), std::greater<float>());
    return few[k - 1];
}

// The candidates of a row: their weights, relative to the largest, in the order of their ids. On memory for `vocab`.
struct Candidates {
    double *weights, *spare;
    int32_t* ids;
    int64_t count = 0;

    static constexpr int64_t FLOATS = 5;  // of memory, for each of the vocabulary
    Candidates(float* memory, int64_t vocab) {
        weights = (double*)memory;
        spare = weights + vocab, ids = (int32_t*)(spare + vocab);
    }

    void add(int64_t id, double weight) { weights[count] = weight, ids[count++] = (int32_t)id; }

    void keep_from(double threshold) {
        int64_t kept = 0;
        for (int64_t i = 0; i < count; i++) {
            weights[kept] = weights[i], ids[kept] = ids[i];
            kept += weights[i] >= threshold;
        }
        count = kept;
    }

    double mass() const {
        double total = 0.0;
        for (int64_t i = 0; i < count; i++) total += weights[i];
        return total;
    }

    // The largest weight such that those of at least this weight hold `top_p` of the mass. Weights are sorted into
    // buckets, 16 to a power of two; only the bucket in which the mass is reached is put in order.
    double mass_threshold(double top_p) {
        double goal = mass() * top_p, held[BUCKETS] = {};
        for (int64_t i = 0; i < count; i++) held[bucket(weights[i])] += weights[i];
        double sum = 0.0;
        int64_t reached = 0;
        while (reached + 1 < BUCKETS && sum + held[reached] < goal) sum += held[reached++];
        int64_t few = 0;
        for (int64_t i = 0; i < count; i++)
            if (bucket(weights[i]) == reached) spare[few++] = weights[i];
        std::sort(spare, spare + few, std::greater<double>());
        for (int64_t i = 0; i < few; i++)
            if ((sum += spare[i]) >= goal) return spare[i];
        return few ? spare[few - 1] : 0.0;
    }

    int64_t draw(double u) const {
        double goal = u * mass(), sum = 0.0;
        int64_t last = 0;
        for (int64_t i = 0; i < count; i++) {
            if (weights[i] > 0.0) last = ids[i];
            if ((sum += weights[i]) > goal) return ids[i];
        }
        return last;  // rounding may push u times the mass onto the very end
    }

   private:
    static constexpr int64_t BUCKETS = 1024;
    static int64_t bucket(double weight) {  // 0 for the largest, 1.0
        uint64_t bits;
        memcpy(&bits, &weight, 8);
        return std::min<int64_t>(BUCKETS - 1, 0x3ff0 - (int64_t)(bits >> 48));
    }
};

void gather(const float* logits, int64_t vocab, double temperature, float top, int64_t top_k, Candidates& to) {
    double shift = (double)top / temperature;
    if (top_k <= 0 || top_k >= vocab) {
        for (int64_t i = 0; i < vocab; i++) to.weights[i] = exp_of((double)logits[i] / temperature - shift);
        for (int64_t i = 0; i < vocab; i++) to.ids[i] = (int32_t)i;
        to.count = vocab;
        return;
    }
    float kth = kth_largest(logits, vocab, top_k), near = kth - 1e-6f * (fabsf(kth) + fabsf(top));
    double least = (double)kth / temperature - shift;
    for (int64_t i = 0; i < vocab; i++) {
        if (logits[i] < near) continue;  // the quotients of others may be equal, once rounded
        double scaled = (double)logits[i] / temperature - shift;
        if (scaled >= least) to.add(i, exp_of(scaled));
    }
}

// Memory for `Candidates`.
int64_t sample_row(const Sampling& s, const float* logits, int64_t row, float* memory) {
    float top;
    if (!largest_of(logits, s.vocab, top)) return 0;  // the engine fails the row
    double temperature = s.temperature[row];
    if (!(temperature > 0.0)) return std::find(logits, logits + s.vocab, top) - logits;
    Candidates found(memory, s.vocab);
    gather(logits, s.vocab, temperature, top, s.top_k[row], found);
    if (s.top_p[row] < 1.0f) found.keep_from(found.mass_threshold(s.top_p[row]));
    if (s.min_p[row] > 0.0f) found.keep_from(s.min_p[row]);
    return found.draw(uniform((uint64_t)s.seeds[row], (uint64_t)s.positions[row]));
}

template <class T>
int32_t choose_row(const Sampling& s, const T* logits, int64_t row, Scratch& scratch) {
    float* memory = scratch.floats((Candidates::FLOATS + 1) * s.vocab + 1);
    float* wide = memory + Candidates::FLOATS * s.vocab;
    float odd = 0.0f;
    for (int64_t i = 0; i < s.vocab; i++) {
        wide[i] = to_float(logits[i]);
        odd = wide[i] - wide[i] == 0.0f ? odd : 1.0f;
    }
    return odd == 0.0f ? (int32_t)sample_row(s, wide, row, memory) : -1;
}

}  // namespace
}  // namespace quire

using namespace quire;

// logits [rows][stride] -> tokens [rows]
extern "C" void quire_sample(Pool* pool, const float* logits, int64_t stride, int64_t rows, int64_t vocab,
                             const float* temperature, const int32_t* top_k, const float* top_p, const float* min_p,
                             const int64_t* seeds, const int64_t* positions, int64_t* tokens) {
    std::lock_guard<std::mutex> hold(pool->lock());
    Sampling s{temperature, top_p, min_p, top_k, seeds, positions, vocab};
    pool->run(rows, [&, logits, stride, tokens](int64_t row, Scratch& scratch) {
        tokens[row] = sample_row(s, logits + row * stride, row, scratch.floats(Candidates::FLOATS * vocab));
    });
}
QUIRE_RECORDED(quire_sample)

// The same of logits that the model has left as they are; -1 for a row that is not finite.
#define QUIRE_CHOOSE(T, NAME)                                                                                       \
    extern "C" void quire_choose_##NAME(Pool* pool, const T* logits, int64_t stride, int64_t rows, int64_t vocab,     \
                                        const float* temperature, const int32_t* top_k, const float* top_p,         \
                                        const float* min_p, const int64_t* seeds, const int64_t* positions,         \
                                        int32_t* tokens) {                                                          \
        std::lock_guard<std::mutex> hold(pool->lock());                                                             \
        Sampling s{temperature, top_p, min_p, top_k, seeds, positions, vocab};                                      \
        pool->run(rows, [&, logits, stride, tokens](int64_t row, Scratch& scratch) {                                \
            tokens[row] = choose_row(s, logits + row * stride, row, scratch);                                       \
        });                                                                                                         \
    }                                                                                                               \
    QUIRE_RECORDED(quire_choose_##NAME)

QUIRE_CHOOSE(float, f32)
QUIRE_CHOOSE(bf16, bf16)
