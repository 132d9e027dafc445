// A pool of threads that claim numbered tasks. Which thread runs a task never changes its result.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace quire {

// Memory of one thread, kept from call to call.
class Scratch {
   public:
    ~Scratch() { free(memory_); }
    float* floats(size_t count) {
        if (count > size_) {
            free(memory_);
            size_ = (count + 1023) / 1024 * 1024;
            memory_ = (float*)aligned_alloc(64, size_ * sizeof(float));
            if (!memory_) throw std::bad_alloc();
        }
        return memory_;
    }

   private:
    float* memory_ = nullptr;
    size_t size_ = 0;
};

class Pool {
   public:
    explicit Pool(int threads);
    ~Pool();
    int threads() const { return (int)workers_.size() + 1; }

    // Calls task(index, scratch) for index 0 to count - 1, on this thread and on those that are free.
    template <class Task>
    void run(int64_t count, const Task& task) {
        auto call = [](const void* context, int64_t index, Scratch& scratch) {
            (*(const Task*)context)(index, scratch);
        };
        dispatch(count, call, &task);
    }

    // Memory shared by the tasks of one call; only within `lock`.
    float* shared(size_t count) { return shared_.floats(count); }
    float* shared2(size_t count) { return shared2_.floats(count); }
    std::mutex& lock() { return lock_; }

   private:
    using Call = void (*)(const void*, int64_t, Scratch&);
    void dispatch(int64_t count, Call call, const void* context);
    bool claim_and_run(Scratch& scratch);
    void work(int slot);

    static constexpr uint64_t CLOSED = 0xffffffffu;  // in the place of the next index: nothing to claim
    std::atomic<uint64_t> ticket_{CLOSED};           // generation << 32 | next index
    std::atomic<int64_t> count_{0}, done_{0};
    std::atomic<Call> call_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    uint64_t generation_ = 0;
    std::mutex lock_, sleep_lock_;
    std::condition_variable wake_;
    std::vector<Scratch> scratch_;
    Scratch shared_, shared2_;
    std::vector<std::thread> workers_;
};

}  // namespace quire
