// AVX-512 in portable C (SIMDe; Debian: libsimde-dev), to test paths that a machine lacks.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

// Conversions that its version 0.7.4 lacks: sixteen lanes, one by one.
template <class To, class From, class Out, class In, class F>
static inline Out converted(In x, F f) {
    From from[16];
    To to[16];
    Out out;
    static_assert(sizeof from == sizeof x && sizeof to == sizeof out, "sixteen lanes");
    memcpy(from, &x, sizeof from);
    for (int i = 0; i < 16; i++) to[i] = f(from[i]);
    memcpy(&out, to, sizeof out);
    return out;
}
static inline simde__m512i emulated_cvtepu16_epi32(simde__m256i x) {
    return converted<int32_t, uint16_t, simde__m512i>(x, [](uint16_t each) { return (int32_t)each; });
}
static inline simde__m512i emulated_cvtepi8_epi32(simde__m128i x) {
    return converted<int32_t, int8_t, simde__m512i>(x, [](int8_t each) { return (int32_t)each; });
}
static inline simde__m256i emulated_cvtepi32_epi16(simde__m512i x) {
    return converted<int16_t, int32_t, simde__m256i>(x, [](int32_t each) { return (int16_t)each; });
}
static inline simde__m128i emulated_cvtepi32_epi8(simde__m512i x) {
    return converted<int8_t, int32_t, simde__m128i>(x, [](int32_t each) { return (int8_t)each; });
}
static inline simde__m512 emulated_cvtepi32_ps(simde__m512i x) {
    return converted<float, int32_t, simde__m512>(x, [](int32_t each) { return (float)each; });
}
static inline simde__m512i emulated_cvtps_epi32(simde__m512 x) {
    return converted<int32_t, float, simde__m512i>(x, [](float each) {
        bool fits = each >= -2147483648.0f && each < 2147483648.0f;
        return fits ? (int32_t)lrintf(each) : INT32_MIN;
    });
}
static inline simde__m512 emulated_cvtph_ps(simde__m256i x) {
    simde__m256 halves[2];
    simde__m128i parts[2];
    simde__m512 out;
    memcpy(parts, &x, sizeof parts);
    for (int i = 0; i < 2; i++) halves[i] = simde_mm256_cvtph_ps(parts[i]);
    memcpy(&out, halves, sizeof out);
    return out;
}
// Of finite numbers.
static inline simde__m512bh emulated_cvtne2ps_pbh(simde__m512 high, simde__m512 low) {
    uint32_t from[32];
    uint16_t to[32];
    simde__m512bh out;
    memcpy(from, &low, sizeof low), memcpy(from + 16, &high, sizeof high);
    for (int i = 0; i < 32; i++) to[i] = (uint16_t)((from[i] + 0x7fffu + (from[i] >> 16 & 1u)) >> 16);
    memcpy(&out, to, sizeof out);
    return out;
}
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
// Its short name takes arguments that the instruction does not have.
#undef _mm512_madd_epi16
#define _mm512_madd_epi16 simde_mm512_madd_epi16
