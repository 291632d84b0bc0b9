/* Clamps (relu, relu6, hardtanh) and what is made of them (hardswish, hardsigmoid), with their
   gradients from a bit mask, from a sign, from the output or from the input. */
#include "mo_kernels.h"

#include <string.h>

#include "mo_tile.h"

#define VEC(L) MO_JOIN(mo_f, L)

enum { RUN = 32 }; /* elements compared together */

void mo_clamp_forward(float *y, const float *x, int32_t n, float lo, float hi) {
  for (int32_t i = 0; i < n; i++) {
    const float v = x[i] < lo ? lo : x[i];
    y[i] = v > hi ? hi : v;
  }
}

/* The elements are compared side by side into bytes of 0 and 1, which vectorises; the product then
   moves byte i of eight to bit 56 + i (little-endian, as all the targets are). */
MO_INLINE void pack(uint8_t *mask, const uint8_t *inside, int32_t count) {
  for (int32_t j = 0; j < count; j += 8) {
    uint64_t bytes;
    memcpy(&bytes, inside + j, sizeof bytes);
    mask[j / 8] = (uint8_t)((bytes * UINT64_C(0x0102040810204080)) >> 56);
  }
}

void mo_mask_pack(uint8_t *mask, const float *y, int32_t n, float lo, float hi) {
  uint8_t inside[RUN] = {0};
  for (int32_t i = 0; i < n; i += RUN) {
    const int32_t count = mo_min(n - i, RUN);
    if (count == RUN) {
      for (int32_t j = 0; j < RUN; j++) inside[j] = (uint8_t)((lo < y[i + j]) & (y[i + j] < hi));
    } else {
      memset(inside, 0, sizeof inside);
      for (int32_t j = 0; j < count; j++) inside[j] = (uint8_t)((lo < y[i + j]) & (y[i + j] < hi));
    }
    pack(mask + i / 8, inside, count);
  }
}

void mo_sign_pack(uint8_t *mask, const float *y, int32_t n) {
  uint8_t positive[RUN] = {0};
  uint32_t bits[RUN];
  for (int32_t i = 0; i < n; i += RUN) {
    const int32_t count = mo_min(n - i, RUN);
    if (count == RUN) {
      memcpy(bits, y + i, sizeof bits);
    } else {
      memset(bits, 0xFF, sizeof bits);
      memcpy(bits, y + i, (size_t)count * sizeof(float));
    }
    for (int32_t j = 0; j < RUN; j++) positive[j] = (uint8_t)(~bits[j] >> 31);
    pack(mask + i / 8, positive, count);
  }
}

/* On the bits of the floats, so that no branch depends on the data. */
void mo_mask_backward(float *dx, const float *dy, const uint8_t *mask, int32_t n) {
  int32_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint32_t bits = mask[i / 8];
    uint32_t v[8];
    memcpy(v, dy + i, sizeof v);
    for (int32_t j = 0; j < 8; j++) v[j] &= 0u - ((bits >> j) & 1u);
    memcpy(dx + i, v, sizeof v);
  }
  for (; i < n; i++) dx[i] = (mask[i / 8] >> (i % 8)) & 1 ? dy[i] : 0.0f;
}

void mo_clamp_backward(float *dx, const float *dy, const float *y, int32_t n, float lo, float hi) {
  for (int32_t i = 0; i < n; i++) dx[i] = lo < y[i] && y[i] < hi ? dy[i] : 0.0f;
}

void mo_sign_backward(float *dx, const float *dy, const float *y, int32_t n) {
  int32_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint32_t v[8], sign[8];
    memcpy(v, dy + i, sizeof v);
    memcpy(sign, y + i, sizeof sign);
    for (int32_t j = 0; j < 8; j++) v[j] &= (sign[j] >> 31) - 1u;
    memcpy(dx + i, v, sizeof v);
  }
  for (; i < n; i++) {
    uint32_t sign;
    memcpy(&sign, y + i, sizeof sign);
    dx[i] = sign >> 31 ? 0.0f : dy[i];
  }
}

#define SIXTH (1.0f / 6.0f)

/* x + 0 makes -0 a +0; the factor is never negative, so the sign of x is that of y. */
void mo_hardswish_forward(float *y, const float *x, int32_t n) {
  int32_t i = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) v = MO_LOAD(L, x + i) + 0.0f;                                           \
    VEC(L) gate = v + 3.0f;                                                              \
    MO_CLAMP(L, gate, 0.0f, 6.0f);                                                       \
    MO_STORE(L, y + i, v * (gate * SIXTH));                                              \
  }
  MO_EACH_LONG(i, n, BODY)
#undef BODY
}

/* where |x| < 3, dy * (x / 3 + 1/2); elsewhere dy or, for a negative x, 0 */
void mo_hardswish_backward(float *dx, const float *dy, const float *x, int32_t n) {
  const int32_t three = mo_bits1(3.0f);
  int32_t i = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) v = MO_LOAD(L, x + i), d = MO_LOAD(L, dy + i), zero = {0};              \
    const VEC(L) inner = d * (v * (1.0f / 3.0f) + 0.5f);                                 \
    const MO_JOIN(mo_i, L) bits = MO_BITS(L, v);                                         \
    const VEC(L) outer = MO_SELECT(L, bits < 0, zero, d);                                \
    MO_STORE(L, dx + i, MO_SELECT(L, (bits & INT32_MAX) < three, inner, outer));         \
  }
  MO_EACH_LONG(i, n, BODY)
#undef BODY
}

void mo_hardsigmoid_forward(float *y, const float *x, int32_t n) {
  int32_t i = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    VEC(L) v = MO_LOAD(L, x + i) + 3.0f;                                                 \
    MO_CLAMP(L, v, 0.0f, 6.0f);                                                          \
    MO_STORE(L, y + i, v * SIXTH);                                                       \
  }
  MO_EACH_LONG(i, n, BODY)
#undef BODY
}

void mo_hardsigmoid_backward(float *dx, const float *dy, const uint8_t *mask, int32_t n) {
  mo_mask_backward(dx, dy, mask, n);
  for (int32_t i = 0; i < n; i++) dx[i] *= SIXTH;
}
