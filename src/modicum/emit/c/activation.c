/* Clamps (relu, relu6, hardtanh) and their gradients, from a bit mask or from the output. */
#include "mo_kernels.h"

void mo_clamp_forward(float *y, const float *x, int32_t n, float lo, float hi) {
  for (int32_t i = 0; i < n; i++) {
    const float v = x[i] < lo ? lo : x[i];
    y[i] = v > hi ? hi : v;
  }
}

void mo_mask_pack(uint8_t *mask, const float *y, int32_t n, float lo, float hi) {
  for (int32_t i = 0; i < n; i += 8) {
    const int32_t count = n - i < 8 ? n - i : 8;
    unsigned bits = 0;
    for (int32_t j = 0; j < count; j++)
      bits |= (unsigned)(lo < y[i + j] && y[i + j] < hi) << j;
    mask[i / 8] = (uint8_t)bits;
  }
}

void mo_mask_backward(float *dx, const float *dy, const uint8_t *mask, int32_t n) {
  for (int32_t i = 0; i < n; i++) dx[i] = (mask[i / 8] >> (i % 8)) & 1 ? dy[i] : 0.0f;
}

void mo_clamp_backward(float *dx, const float *dy, const float *y, int32_t n, float lo, float hi) {
  for (int32_t i = 0; i < n; i++) dx[i] = lo < y[i] && y[i] < hi ? dy[i] : 0.0f;
}
