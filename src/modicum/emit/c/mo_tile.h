/* Vector types and the few compiler extensions that the tiled kernels use, each with a plain C99
   fallback of one lane.  Internal: include mo_kernels.h from outside. */
#ifndef MO_TILE_H
#define MO_TILE_H

#include <stdint.h>

/* MO_LANES: floats per vector, 1, 4, 8 or 16.  (NEON of 32-bit Arm flushes denormals: not used.) */
#ifndef MO_LANES
#if !defined(__GNUC__)
#define MO_LANES 1
#elif defined(__AVX512F__)
#define MO_LANES 16
#elif defined(__AVX__)
#define MO_LANES 8
#elif defined(__SSE2__) || defined(__aarch64__)
#define MO_LANES 4
#elif defined(__ARM_FEATURE_MVE)
#if __ARM_FEATURE_MVE & 2
#define MO_LANES 4
#else
#define MO_LANES 1
#endif
#else
#define MO_LANES 1
#endif
#endif

#if MO_LANES != 1 && MO_LANES != 4 && MO_LANES != 8 && MO_LANES != 16
#error "MO_LANES is 1, 4, 8 or 16"
#endif

/* MO_REGISTERS: the vector registers of the machine, which bound a tile */
#if defined(__AVX512F__) || defined(__aarch64__)
#define MO_REGISTERS 32
#elif defined(__ARM_FEATURE_MVE)
#define MO_REGISTERS 8
#else
#define MO_REGISTERS 16
#endif

#if defined(__GNUC__)
#define MO_INLINE static inline __attribute__((always_inline))
#define MO_NOINLINE static __attribute__((noinline)) /* one small stack frame, not many in one */
#else
#define MO_INLINE static inline
#define MO_NOINLINE static
#endif

/* MO_UNROLL stands before a loop of constant length whose arrays shall become registers, MO_LOOP
   before one around it that shall stay small, MO_BY_FOUR before a short one of any length. */
#if defined(__clang__)
#define MO_UNROLL _Pragma("clang loop unroll(full)")
#define MO_LOOP _Pragma("clang loop unroll(disable)")
#define MO_BY_FOUR _Pragma("clang loop unroll_count(4)")
#elif defined(__GNUC__)
#define MO_UNROLL _Pragma("GCC unroll 32")
#define MO_LOOP _Pragma("GCC unroll 1")
#define MO_BY_FOUR _Pragma("GCC unroll 4")
#else
#define MO_UNROLL
#define MO_LOOP
#define MO_BY_FOUR
#endif

#define MO_JOIN_(a, b) a##b
#define MO_JOIN(a, b) MO_JOIN_(a, b)

/* mo_fL: a vector of L floats; mo_uL: the same at any address; mo_iL: as integers */
typedef float mo_f1, mo_u1;
#if MO_LANES > 1
#define MO_VECTOR(L)                                                                \
  typedef float mo_f##L __attribute__((vector_size(4 * L)));                        \
  typedef float mo_u##L __attribute__((vector_size(4 * L), aligned(4), may_alias)); \
  typedef int32_t mo_i##L __attribute__((vector_size(4 * L)));
MO_VECTOR(4)
#endif
#if MO_LANES > 4
MO_VECTOR(8)
#endif
#if MO_LANES > 8
MO_VECTOR(16)
#endif
typedef int32_t mo_i1;
#define MO_LOAD(L, address) ((MO_JOIN(mo_f, L)) * (const MO_JOIN(mo_u, L) *)(address))
#define MO_STORE(L, address, value) (*(MO_JOIN(mo_u, L) *)(address) = (value))

/* MO_EACH(j, n, BODY) runs BODY(L) for vectors of L floats at j = 0, L, ... that cover 0 .. n. */
#define MO_EACH_(j, n, L, BODY) \
  for (; j + L <= n; j += L) BODY(L)
#if MO_LANES == 16
#define MO_EACH(j, n, BODY) \
  MO_EACH_(j, n, 16, BODY) MO_EACH_(j, n, 8, BODY) MO_EACH_(j, n, 4, BODY) MO_EACH_(j, n, 1, BODY)
#elif MO_LANES == 8
#define MO_EACH(j, n, BODY) \
  MO_EACH_(j, n, 8, BODY) MO_EACH_(j, n, 4, BODY) MO_EACH_(j, n, 1, BODY)
#elif MO_LANES == 4
#define MO_EACH(j, n, BODY) MO_EACH_(j, n, 4, BODY) MO_EACH_(j, n, 1, BODY)
#else
#define MO_EACH(j, n, BODY) MO_BY_FOUR MO_EACH_(j, n, 1, BODY)
#endif
/* The same for a long BODY, of which single lanes shall not make four */
#if MO_LANES > 1
#define MO_EACH_LONG(j, n, BODY) MO_EACH(j, n, BODY)
#else
#define MO_EACH_LONG(j, n, BODY) MO_LOOP MO_EACH_(j, n, 1, BODY)
#endif

MO_INLINE int32_t mo_min(int32_t a, int32_t b) { return a < b ? a : b; }
MO_INLINE int32_t mo_max(int32_t a, int32_t b) { return a > b ? a : b; }

MO_INLINE int32_t mo_ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

typedef struct {
  int32_t begin, end;
} mo_range_t;

/* The outputs i in [0, out) whose input i * stride + offset lies in [0, in) */
MO_INLINE mo_range_t mo_outputs_inside(int32_t offset, int32_t stride, int32_t in, int32_t out) {
  mo_range_t t;
  t.begin = offset < 0 ? mo_min(mo_ceil_div(-offset, stride), out) : 0;
  t.end = offset < in ? mo_min(mo_ceil_div(in - offset, stride), out) : 0;
  t.end = mo_max(t.begin, t.end);
  return t;
}

/* The taps j in [0, taps) for which x + j * tap lies in [0, width) */
MO_INLINE mo_range_t mo_taps_inside(int32_t x, int32_t tap, int32_t taps, int32_t width) {
  mo_range_t t;
  if (tap < 0) { /* seen from the other end of the row */
    x = width - 1 - x;
    tap = -tap;
  }
  t.begin = x < 0 ? mo_min(mo_ceil_div(-x, tap), taps) : 0;
  t.end = x < width ? mo_min(mo_ceil_div(width - x, tap), taps) : 0;
  return t;
}

/* v = clamp(v, lo, hi) for a vector of L lanes.  A NaN is neither below nor above, and stays. */
#define MO_CLAMP(L, v, lo, hi) MO_JOIN(mo_clamp, L)(&(v), lo, hi)

MO_INLINE void mo_clamp1(float *v, float lo, float hi) {
  *v = *v < lo ? lo : *v;
  *v = *v > hi ? hi : *v;
}

/* s in every lane; s - 0 keeps the sign of a zero, 0 + s would not. */
#define MO_SPREAD(L, s) ((s) - (MO_JOIN(mo_f, L)){0})

#define MO_DEFINE_CLAMP(L)                                                      \
  MO_INLINE void mo_clamp##L(mo_f##L *v, float lo, float hi) {                  \
    const mo_i##L low = (mo_i##L)MO_SPREAD(L, lo), below = *v < (mo_f##L)low;   \
    *v = (mo_f##L)((~below & (mo_i##L)*v) | (below & low));                     \
    const mo_i##L high = (mo_i##L)MO_SPREAD(L, hi), above = *v > (mo_f##L)high; \
    *v = (mo_f##L)((~above & (mo_i##L)*v) | (above & high));                    \
  }
#if MO_LANES > 1
MO_DEFINE_CLAMP(4)
#endif
#if MO_LANES > 4
MO_DEFINE_CLAMP(8)
#endif
#if MO_LANES > 8
MO_DEFINE_CLAMP(16)
#endif

/* Vectors of floats as their bits, and back */
#define MO_BITS(L, v) MO_JOIN(MO_BITS, L)(v)
#define MO_BITS1(v) mo_bits1(v)
#define MO_BITS4(v) ((mo_i4)(v))
#define MO_BITS8(v) ((mo_i8)(v))
#define MO_BITS16(v) ((mo_i16)(v))
#define MO_FLOAT(L, v) MO_JOIN(MO_FLOAT, L)(v)
#define MO_FLOAT1(v) mo_float1(v)
#define MO_FLOAT4(v) ((mo_f4)(v))
#define MO_FLOAT8(v) ((mo_f8)(v))
#define MO_FLOAT16(v) ((mo_f16)(v))

MO_INLINE int32_t mo_bits1(float value) {
  union {
    float value;
    int32_t bits;
  } u;
  u.value = value;
  return u.bits;
}

MO_INLINE float mo_float1(int32_t bits) {
  union {
    float value;
    int32_t bits;
  } u;
  u.bits = bits;
  return u.value;
}

/* Lane by lane, condition ? a : b.  The condition compares integers: with floats, gcc 12 for MVE
   takes lane 0 alone. */
#define MO_SELECT(L, condition, a, b) MO_JOIN(MO_SELECT, L)(L, condition, a, b)
#define MO_SELECT1(L, condition, a, b) ((condition) ? (a) : (b))
#define MO_SELECT4(L, condition, a, b) \
  MO_FLOAT(L, ((condition)&MO_BITS(L, a)) | (~(condition)&MO_BITS(L, b)))
#define MO_SELECT8 MO_SELECT4
#define MO_SELECT16 MO_SELECT4

#if defined(__GNUC__)
MO_INLINE float mo_square_root(float x) { return __builtin_sqrtf(x); }
#else
/* Newton's iteration; from max(x, 1) it only falls, and stops at the root */
MO_INLINE float mo_square_root(float x) {
  float r = x > 1.0f ? x : 1.0f;
  for (float next = 0.5f * (r + x / r); next < r; next = 0.5f * (r + x / r)) r = next;
  return r;
}
#endif

#if defined(__has_builtin) && MO_REGISTERS > 8
#if __has_builtin(__builtin_shufflevector)
#define MO_HAS_ZIP 1
/* The first and the second half of a0 b0 a1 b1 ... */
#define MO_ZIP_LO4(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define MO_ZIP_HI4(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define MO_ZIP_LO8(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define MO_ZIP_HI8(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define MO_ZIP_LO16(a, b) \
  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define MO_ZIP_HI16(a, b) \
  __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#endif
#endif
#ifndef MO_HAS_ZIP
#define MO_HAS_ZIP 0
#endif

#endif
