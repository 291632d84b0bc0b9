/* Per-channel operations on [pixels][c]. */
#include "mo_kernels.h"

void mo_bias_grad(float *db, const float *dy, int32_t pixels, int32_t c, int accumulate) {
  if (!accumulate)
    for (int32_t j = 0; j < c; j++) db[j] = 0.0f;
  for (int32_t p = 0; p < pixels; p++, dy += c)
    for (int32_t j = 0; j < c; j++) db[j] += dy[j];
}

void mo_affine_forward(float *y, const float *x, const float *gamma, const float *beta,
                       const float *mean, const float *rstd, int32_t pixels, int32_t c, float lo,
                       float hi) {
  for (int32_t j = 0; j < c; j++) {
    const float scale = gamma[j] * rstd[j], shift = beta[j] - mean[j] * scale;
    for (int32_t p = 0; p < pixels; p++) {
      const float v = x[p * c + j] * scale + shift;
      const float raised = v < lo ? lo : v;
      y[p * c + j] = raised > hi ? hi : raised;
    }
  }
}

void mo_affine_dx(float *dx, const float *dy, const float *gamma, const float *rstd,
                  int32_t pixels, int32_t c) {
  for (int32_t j = 0; j < c; j++) {
    const float scale = gamma[j] * rstd[j];
    for (int32_t p = 0; p < pixels; p++) dx[p * c + j] = dy[p * c + j] * scale;
  }
}

void mo_affine_dgamma(float *dgamma, const float *dy, const float *x, const float *mean,
                      const float *rstd, int32_t pixels, int32_t c, int accumulate) {
  if (!accumulate)
    for (int32_t j = 0; j < c; j++) dgamma[j] = 0.0f;
  for (int32_t p = 0; p < pixels; p++, dy += c, x += c)
    for (int32_t j = 0; j < c; j++) dgamma[j] += dy[j] * ((x[j] - mean[j]) * rstd[j]);
}
