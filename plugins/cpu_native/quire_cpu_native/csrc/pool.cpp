#include "pool.h"

#include <chrono>

namespace quire {

namespace {

// How long a thread looks for work before it sleeps: longer than the interpreter needs from one call to the next, also
// where what a kernel has read pushed it out of the caches.
constexpr auto SPIN = std::chrono::microseconds(400);
// How long it keeps its processor meanwhile. Within a step the next kernel comes sooner; between two steps others, such
// as the server that hands out the tokens, have work for it.
constexpr auto KEEP = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace

Pool::Pool(int threads) : scratch_(threads) {
    for (int slot = 1; slot < threads; slot++) workers_.emplace_back([this, slot] { work(slot); });
}

Pool::~Pool() {
    stop_ = true;
    {
        std::lock_guard<std::mutex> hold(sleep_lock_);
        wake_.notify_all();
    }
    for (auto& worker : workers_) worker.join();
}

// A job's fields are written while the ticket is closed. Whoever claims an index by exchanging the ticket has
// therefore read the fields of that very job: had they changed in between, so had the generation.
bool Pool::claim_and_run(Scratch& scratch) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
        uint64_t index = ticket & CLOSED;
        int64_t count = count_.load(std::memory_order_acquire);
        Call call = call_.load(std::memory_order_acquire);
        const void* context = context_.load(std::memory_order_acquire);
        if (index == CLOSED || (int64_t)index >= count) return false;
        if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
            call(context, (int64_t)index, scratch);
            done_.fetch_add(1, std::memory_order_release);
            return true;
        }
    }
}

void Pool::dispatch(int64_t count, Call call, const void* context) {
    if (count <= 0) return;
    if (count == 1 || workers_.empty()) {
        for (int64_t index = 0; index < count; index++) call(context, index, scratch_[0]);
        return;
    }
    count_.store(count, std::memory_order_release);
    call_.store(call, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    generation_ = (generation_ + 1) & CLOSED;
    ticket_.store(generation_ << 32, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
        std::lock_guard<std::mutex> hold(sleep_lock_);
        wake_.notify_all();
    }
    while (claim_and_run(scratch_[0])) {
    }
    // Others may still be at their last task; one of them may have lost its processor.
    for (int round = 0; done_.load(std::memory_order_acquire) < count; round++) {
        if (round < 2000)
            pause();
        else
            std::this_thread::yield();
    }
    ticket_.store(generation_ << 32 | CLOSED, std::memory_order_release);
}

void Pool::work(int slot) {
    auto idle_since = std::chrono::steady_clock::now();
    while (!stop_.load(std::memory_order_relaxed)) {
        bool worked = false;
        while (claim_and_run(scratch_[slot])) worked = true;
        auto now = std::chrono::steady_clock::now();
        if (worked) idle_since = now;
        if (now - idle_since < SPIN) {
            for (int i = 0; i < 20; i++) pause();
            if (now - idle_since > KEEP) std::this_thread::yield();
            continue;
        }
        std::unique_lock<std::mutex> hold(sleep_lock_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        uint64_t seen = ticket_.load(std::memory_order_seq_cst);
        bool open = (seen & CLOSED) != CLOSED && (int64_t)(seen & CLOSED) < count_.load();
        if (!open && !stop_) wake_.wait(hold);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        idle_since = std::chrono::steady_clock::now();
    }
}

}  // namespace quire

using quire::Pool;

extern "C" {

Pool* quire_pool_new(int64_t threads) {
    try {
        return new Pool((int)threads);
    } catch (...) {  // the system refuses more threads
        return nullptr;
    }
}

void quire_pool_delete(Pool* pool) { delete pool; }
}
