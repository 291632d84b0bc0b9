/* Losses, with their own exp and log: no libm, so the bits are the same everywhere. */
#include "mo_kernels.h"

typedef union {
  float value;
  uint32_t bits;
} float_bits_t;

static float from_bits(uint32_t bits) {
  float_bits_t x;
  x.bits = bits;
  return x.value;
}

static uint32_t to_bits(float value) {
  float_bits_t x;
  x.value = value;
  return x.bits;
}

/* 2^n for -126 <= n <= 127 */
static float power_of_two(int32_t n) { return from_bits((uint32_t)(n + 127) << 23); }

/* ln 2 in two parts: the first has few bits, so that n times it is exact for |n| <= 256 */
#define LN2_HI 0.693359375f
#define LN2_LO (-2.12194440e-4f)
#define INFINITE 0x7F800000u
#define NOT_A_NUMBER 0x7FC00000u

/* exp(x) = 2^n exp(r), r = x - n ln 2, |r| <= ln 2 / 2, exp(r) by its Taylor series */
float mo_exp(float x) {
  if ((to_bits(x) & 0x7FFFFFFFu) > INFINITE) return x;
  if (x < -87.0f) return 0.0f;
  if (x > 88.7228f) return from_bits(INFINITE);
  const float scaled = x * 1.44269504f;
  const int32_t n = (int32_t)(scaled < 0.0f ? scaled - 0.5f : scaled + 0.5f);
  const float r = (x - (float)n * LN2_HI) - (float)n * LN2_LO;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  /* two factors, because 2^128 is no float */
  return p * power_of_two(n / 2) * power_of_two(n - n / 2);
}

/* log(x) = e ln 2 + log(m), m in [sqrt(1/2), sqrt(2)]; log(m) = 2 atanh((m - 1) / (m + 1)) */
float mo_log(float x) {
  const uint32_t bits = to_bits(x);
  if (bits >= INFINITE) /* infinite, NaN or negative */
    return bits == INFINITE ? x : from_bits(bits == 0x80000000u ? 0xFF800000u : NOT_A_NUMBER);
  if (bits < 0x00800000u) return from_bits(0xFF800000u); /* zero; denormals count as zero */
  int32_t e = (int32_t)(bits >> 23) - 127;
  float m = from_bits((bits & 0x007FFFFFu) | 0x3F800000u);
  if (m > 1.41421356f) {
    m *= 0.5f;
    e += 1;
  }
  const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
  float p = 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  p = p * q * s + s;
  return (float)e * LN2_HI + (2.0f * p + (float)e * LN2_LO);
}

float mo_cross_entropy(float *z, int32_t n, int32_t label, float scale) {
  if (!mo_all_finite(z, n) || label < 0 || label >= n) {
    for (int32_t i = 0; i < n; i++) z[i] = from_bits(NOT_A_NUMBER);
    return from_bits(NOT_A_NUMBER);
  }
  float max = z[0];
  for (int32_t i = 1; i < n; i++) max = z[i] > max ? z[i] : max;
  const float target = z[label];
  float sum = 0.0f;
  for (int32_t i = 0; i < n; i++) {
    z[i] = mo_exp(z[i] - max);
    sum += z[i];
  }
  for (int32_t i = 0; i < n; i++) z[i] = scale * (z[i] / sum - (i == label ? 1.0f : 0.0f));
  return mo_log(sum) + (max - target);
}

float mo_mse(float *z, const float *target, int32_t n, float scale) {
  const float slope = scale * 2.0f / (float)n;
  float sum = 0.0f;
  for (int32_t i = 0; i < n; i++) {
    const float error = z[i] - target[i];
    sum += error * error;
    z[i] = slope * error;
  }
  return sum / (float)n;
}
