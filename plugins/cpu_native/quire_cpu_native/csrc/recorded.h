// Calls that were noted once and run again: every exported kernel has a sibling that takes its arguments as words.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "pool.h"

namespace quire {

// An argument as it was noted: a pointer, a whole number, or the bits of a float in the lower half.
template <class T>
T from_word(uint64_t word) {
    auto bits = (std::conditional_t<sizeof(T) == sizeof(uint32_t), uint32_t, uint64_t>)word;
    T value;
    static_assert(sizeof value == sizeof bits);
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class... Arguments, size_t... Index>
void call_with(void (*kernel)(Pool*, Arguments...), Pool* pool, const uint64_t* words, std::index_sequence<Index...>) {
    kernel(pool, from_word<Arguments>(words[Index])...);
}

template <class... Arguments>
void call_with(void (*kernel)(Pool*, Arguments...), Pool* pool, const uint64_t* words) {
    call_with(kernel, pool, words, std::index_sequence_for<Arguments...>());
}

}  // namespace quire

#define QUIRE_RECORDED(KERNEL)                                                        \
    extern "C" void KERNEL##_recorded(quire::Pool* pool, const uint64_t* words) { \
        quire::call_with(KERNEL, pool, words);                                        \
    }
