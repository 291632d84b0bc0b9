/* Clamps (relu, relu6, hardtanh) and their gradients, from a bit mask or from the output. */
#include "mo_kernels.h"

#include <string.h>

enum { RUN = 32 }; /* elements compared together */

void mo_clamp_forward(float *y, const float *x, int32_t n, float lo, float hi) {
  for (int32_t i = 0; i < n; i++) {
    const float v = x[i] < lo ? lo : x[i];
    y[i] = v > hi ? hi : v;
  }
}

/* The elements are compared side by side into bytes of 0 and 1, which vectorises; the product then
   moves byte i of eight to bit 56 + i (little-endian, as all the targets are). */
void mo_mask_pack(uint8_t *mask, const float *y, int32_t n, float lo, float hi) {
  uint8_t inside[RUN] = {0};
  for (int32_t i = 0; i < n; i += RUN) {
    const int32_t count = n - i < RUN ? n - i : RUN;
    if (count == RUN) {
      for (int32_t j = 0; j < RUN; j++) inside[j] = (uint8_t)((lo < y[i + j]) & (y[i + j] < hi));
    } else {
      memset(inside, 0, sizeof inside);
      for (int32_t j = 0; j < count; j++) inside[j] = (uint8_t)((lo < y[i + j]) & (y[i + j] < hi));
    }
    for (int32_t j = 0; j < count; j += 8) {
      uint64_t bytes;
      memcpy(&bytes, inside + j, sizeof bytes);
      mask[(i + j) / 8] = (uint8_t)((bytes * UINT64_C(0x0102040810204080)) >> 56);
    }
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
