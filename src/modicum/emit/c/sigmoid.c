/* Sigmoid and SiLU.  Their exp is branch-free, so that vectors of any width can hold it; for every
   argument up to 0 it has the bits of mo_exp. */
#include "mo_kernels.h"
#include "mo_tile.h"

#define VEC(L) MO_JOIN(mo_f, L)

/* t = t rounded toward 0, power = 2^t, for -126 <= t <= 0 */
MO_INLINE void split1(float *t, float *power) {
  const int32_t n = (int32_t)*t;
  *power = mo_float1((n + 127) * (1 << 23));
  *t = (float)n;
}

#define DEFINE_SPLIT(L)                                            \
  MO_INLINE void split##L(mo_f##L *t, mo_f##L *power) {            \
    mo_i##L n;                                                     \
    MO_UNROLL for (int k = 0; k < L; k++) n[k] = (int32_t)(*t)[k]; \
    *power = (mo_f##L)((n + 127) * (1 << 23));                     \
    MO_UNROLL for (int k = 0; k < L; k++) (*t)[k] = (float)n[k];   \
  }

/* s = 1 / (1 + exp(-x)), from exp(-|x|) = 2^n exp(r) as in mo_exp.  2^n is a float, as n >= -126;
   n comes from a number in range even where t is none, and t itself keeps a NaN. */
#define LEAST (-87.0f)
#define DEFINE_SIGMOID(L)                                                           \
  MO_INLINE void sigmoid##L(VEC(L) *s, const VEC(L) *x) {                           \
    const MO_JOIN(mo_i, L) bits = MO_BITS(L, *x), size = bits & INT32_MAX;          \
    const VEC(L) zero = {0}, one = MO_SPREAD(L, 1.0f), least = MO_SPREAD(L, LEAST); \
    const VEC(L) t = MO_FLOAT(L, bits | INT32_MIN);                                 \
    const int32_t far = mo_bits1(-LEAST), infinite = mo_bits1(INFINITY);            \
    VEC(L) power, n = MO_SELECT(L, size > far, least, t) * 1.44269504f - 0.5f;      \
    MO_JOIN(split, L)(&n, &power);                                                  \
    const VEC(L) r = (t - n * 0.693359375f) - n * (-2.12194440e-4f);                \
    VEC(L) p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;                                \
    p = p * r + 1.0f / 120.0f;                                                      \
    p = p * r + 1.0f / 24.0f;                                                       \
    p = p * r + 1.0f / 6.0f;                                                        \
    p = p * r + 0.5f;                                                               \
    p = p * r + 1.0f;                                                               \
    p = (p * r + 1.0f) * power;                                                     \
    p = MO_SELECT(L, (size > far) & (size <= infinite), zero, p);                   \
    *s = MO_SELECT(L, bits < 0, p, one) / (1.0f + p);                               \
  }
DEFINE_SIGMOID(1)
#if MO_LANES > 1
DEFINE_SPLIT(4)
DEFINE_SIGMOID(4)
#endif
#if MO_LANES > 4
DEFINE_SPLIT(8)
DEFINE_SIGMOID(8)
#endif
#if MO_LANES > 8
DEFINE_SPLIT(16)
DEFINE_SIGMOID(16)
#endif

void mo_sigmoid_forward(float *y, const float *x, int32_t n) {
  int32_t i = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) v = MO_LOAD(L, x + i);                                                  \
    VEC(L) s;                                                                            \
    MO_JOIN(sigmoid, L)(&s, &v);                                                         \
    MO_STORE(L, y + i, s);                                                               \
  }
  MO_EACH_LONG(i, n, BODY)
#undef BODY
}

void mo_sigmoid_backward(float *dx, const float *dy, const float *y, int32_t n) {
  int32_t i = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) s = MO_LOAD(L, y + i);                                                  \
    MO_STORE(L, dx + i, MO_LOAD(L, dy + i) * s * (1.0f - s));                            \
  }
  MO_EACH(i, n, BODY)
#undef BODY
}

/* x + 0 makes -0 a +0; s is never negative, so the sign of x is that of y. */
void mo_silu_forward(float *y, const float *x, int32_t n) {
  int32_t i = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) v = MO_LOAD(L, x + i) + 0.0f;                                           \
    VEC(L) s;                                                                            \
    MO_JOIN(sigmoid, L)(&s, &v);                                                         \
    MO_STORE(L, y + i, v * s);                                                           \
  }
  MO_EACH_LONG(i, n, BODY)
#undef BODY
}

void mo_silu_backward(float *dx, const float *dy, const float *x, int32_t n) {
  int32_t i = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) v = MO_LOAD(L, x + i);                                                  \
    VEC(L) s;                                                                            \
    MO_JOIN(sigmoid, L)(&s, &v);                                                         \
    MO_STORE(L, dx + i, MO_LOAD(L, dy + i) * (s * (1.0f + v * (1.0f - s))));             \
  }
  MO_EACH_LONG(i, n, BODY)
#undef BODY
}
