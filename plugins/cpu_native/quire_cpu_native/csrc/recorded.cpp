#include "recorded.h"

namespace {

// Fields as in `native.py`.
struct Call {
    void (*kernel)(quire::Pool*, const uint64_t*);
    quire::Pool* pool;
    const uint64_t* words;
};

}  // namespace

// In the order in which they were noted.
extern "C" void quire_replay(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) calls[i].kernel(calls[i].pool, calls[i].words);
}
