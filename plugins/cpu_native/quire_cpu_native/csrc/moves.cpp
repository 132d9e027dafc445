// What torch's operations on a step's tokens do: few bytes, so that one thread moves them all.
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "pool.h"
#include "recorded.h"

using quire::Pool;

// `failed` is set where torch would complain; the rest of the work is left undone then.

// source [rows][bytes] -> out [count][bytes]: the rows that `index` [count] names.
extern "C" void quire_gather(Pool*, const char* source, int64_t rows, int64_t bytes, const int64_t* index,
                             int64_t count, char* out, int64_t* failed) {
    for (int64_t i = 0; i < count; i++) {
        if (index[i] < 0 || index[i] >= rows) return void(*failed = 1);
        memcpy(out + i * bytes, source + index[i] * bytes, bytes);
    }
}

// source [count][bytes] -> the rows of target [rows][bytes] that `index` [count] names, in this order.
extern "C" void quire_scatter(Pool*, char* target, int64_t rows, int64_t bytes, const int64_t* index, int64_t count,
                              const char* source, int64_t* failed) {
    for (int64_t i = 0; i < count; i++) {
        if (index[i] < 0 || index[i] >= rows) return void(*failed = 1);
        memcpy(target + index[i] * bytes, source + i * bytes, bytes);
    }
}

// The rows that `index` [count] names of a matrix which a file has from `offset` on -> out [count][bytes].
extern "C" void quire_read_rows(Pool*, const int64_t* index, int64_t count, int64_t file, int64_t offset,
                                int64_t bytes, char* out, int64_t* failed) {
    for (int64_t i = 0; i < count; i++)
        if (pread((int)file, out + i * bytes, bytes, offset + index[i] * bytes) != bytes) return void(*failed = 1);
}

extern "C" void quire_widen(Pool*, const int32_t* from, int64_t count, int64_t* to) {
    for (int64_t i = 0; i < count; i++) to[i] = from[i];
}

extern "C" void quire_at_least(Pool*, const int32_t* from, int64_t count, int64_t least, int32_t* to) {
    for (int64_t i = 0; i < count; i++) to[i] = from[i] < least ? (int32_t)least : from[i];
}

QUIRE_RECORDED(quire_gather)
QUIRE_RECORDED(quire_scatter)
QUIRE_RECORDED(quire_read_rows)
QUIRE_RECORDED(quire_widen)
QUIRE_RECORDED(quire_at_least)
