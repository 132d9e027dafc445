// Vectors of eight lanes out of two registers of NEON, so that sums are taken in AVX2's order and have its bits.
#pragma once
#include <arm_neon.h>

namespace quire {

constexpr int W = 8;
struct V {
    float32x4_t a, b;
};
static inline V set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
static inline V zero() { return set1(0.0f); }
static inline V load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline void store(float* p, V x) { vst1q_f32(p, x.a), vst1q_f32(p + 4, x.b); }
static inline V fma(V x, V y, V z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
static inline V add(V x, V y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
static inline V sub(V x, V y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
static inline V mul(V x, V y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
static inline V div(V x, V y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
// Where one is no number: the second, as on x86.
static inline V max(V x, V y) {
    return {vbslq_f32(vcgtq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcgtq_f32(x.b, y.b), x.b, y.b)};
}
static inline V min(V x, V y) {
    return {vbslq_f32(vcltq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcltq_f32(x.b, y.b), x.b, y.b)};
}

static inline float32x4_t wide(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
static inline V load(const bf16* p) { return {wide(vld1_u16(p)), wide(vld1_u16(p + 4))}; }
static inline uint32x4_t pairs(const bf16* p) { return vreinterpretq_u32_u16(vld1q_u16(p)); }
static inline V first_of_pairs(const bf16* p) {
    return {vreinterpretq_f32_u32(vshlq_n_u32(pairs(p), 16)), vreinterpretq_f32_u32(vshlq_n_u32(pairs(p + 8), 16))};
}
static inline V second_of_pairs(const bf16* p) {
    uint32x4_t mask = vdupq_n_u32(0xffff0000u);
    return {vreinterpretq_f32_u32(vandq_u32(pairs(p), mask)), vreinterpretq_f32_u32(vandq_u32(pairs(p + 8), mask))};
}
static inline uint16x4_t narrow(float32x4_t x) {
    uint32x4_t bits = vreinterpretq_u32_f32(x), one = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t up = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), one), 16);
    return vmovn_u32(vbslq_u32(vceqq_f32(x, x), up, vdupq_n_u32(0x7fc0)));
}
static inline void store(bf16* p, V x) { vst1_u16(p, narrow(x.a)), vst1_u16(p + 4, narrow(x.b)); }

struct I {
    int32x4_t a, b;
};
static inline I zero_int() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
static inline I load_int(const void* p) { return {vld1q_s32((const int32_t*)p), vld1q_s32((const int32_t*)p + 4)}; }
static inline I set1_int(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
static inline V to_float(I x) { return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b)}; }
static inline I add_int(I a, I b) { return {vaddq_s32(a.a, b.a), vaddq_s32(a.b, b.b)}; }
static inline int32x4_t sub_of16(int32x4_t x, int32x4_t y) {
    return vreinterpretq_s32_s16(vsubq_s16(vreinterpretq_s16_s32(x), vreinterpretq_s16_s32(y)));
}
static inline I sub_of16(I a, I b) { return {sub_of16(a.a, b.a), sub_of16(a.b, b.b)}; }
static inline I nearest(V x) { return {vcvtnq_s32_f32(x.a), vcvtnq_s32_f32(x.b)}; }
static inline V round_to_even(V x) { return to_float(nearest(x)); }
static inline V power_of_two(V n) {
    I whole = nearest(n);
    int32x4_t bias = vdupq_n_s32(127);
    return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(whole.a, bias), 23)),
            vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(whole.b, bias), 23))};
}

static inline int32x4_t field(int32x4_t x, int shift, uint32_t mask) {
    uint32x4_t moved = vshlq_u32(vreinterpretq_u32_s32(x), vdupq_n_s32(-shift));
    return vreinterpretq_s32_u32(vandq_u32(moved, vdupq_n_u32(mask)));
}
static inline int32x4_t field_of16(int32x4_t x, int shift, uint16_t mask) {
    uint16x8_t moved = vshlq_u16(vreinterpretq_u16_s32(x), vdupq_n_s16((int16_t)-shift));
    return vreinterpretq_s32_u16(vandq_u16(moved, vdupq_n_u16(mask)));
}
static inline V field(I x, int shift, int mask) {
    return to_float(I{field(x.a, shift, (uint32_t)mask), field(x.b, shift, (uint32_t)mask)});
}
static inline I field_of16(I x, int shift, int mask) {
    return {field_of16(x.a, shift, (uint16_t)mask), field_of16(x.b, shift, (uint16_t)mask)};
}
static inline int32x4_t field_of8(int32x4_t x, int mask) {
    return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(x), vdupq_n_u8((uint8_t)mask)));
}
static inline I field_of8(I x, int mask) { return {field_of8(x.a, mask), field_of8(x.b, mask)}; }
template <int N>
static inline int32x4_t lowered(int32x4_t x) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), N)); }
template <int N>
static inline I lowered(I x) { return {lowered<N>(x.a), lowered<N>(x.b)}; }
static inline I merged(int mask, I a, I b) {
    uint32x4_t wide = vreinterpretq_u32_u8(vdupq_n_u8((uint8_t)mask));
    return {vbslq_s32(wide, a.a, b.a), vbslq_s32(wide, a.b, b.b)};
}

static inline int32x4_t add_products(int32x4_t c, int32x4_t a, int32x4_t b) {
    int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
    return vaddq_s32(c, vpaddq_s32(low, high));
}
static inline I add_products(I c, I a, I b) { return {add_products(c.a, a.a, b.a), add_products(c.b, a.b, b.b)}; }

constexpr bool FOURS_AT_ONCE = true;
// Bytes of x are read as signed: they are codes of 4 or 6 bits, or centred ones of 8.
static inline int32x4_t add_byte_products(int32x4_t c, int32x4_t x, int32x4_t y) {
    int8x16_t a = vreinterpretq_s8_s32(x), b = vreinterpretq_s8_s32(y);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(c, a, b);
#else
    int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vpadalq_s16(c, vpaddq_s16(low, high));
#endif
}
static inline I add_byte_products(I c, I a, I b) {
    return {add_byte_products(c.a, a.a, b.a), add_byte_products(c.b, a.b, b.b)};
}
static inline I whole_sums(I c) { return c; }
constexpr float TAKEN_OFF = 128.0f;
struct Factors {
    I centred;
};
static inline int32x4_t centred(int32x4_t x) { return veorq_s32(x, vdupq_n_s32((int32_t)0x80808080u)); }
static inline Factors factors(I codes) { return {I{centred(codes.a), centred(codes.b)}}; }
// 128 · 127 · 2 < 2^15
static inline I add_code_products(I c, Factors a, I b) { return add_byte_products(c, a.centred, b); }

static inline V load(const int8_t* p) {
    int16x8_t x = vmovl_s8(vld1_s8(p));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_high_s16(x))};
}
static inline V load(const half* p) {
    float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
    return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
}

}  // namespace quire
