/* Per-channel operations on [pixels][c]; a vector of channels passes over all pixels. */
#include "mo_kernels.h"
#include "mo_tile.h"

#define VEC(L) MO_JOIN(mo_f, L)
#define FIRST(L, start) (accumulate ? MO_LOAD(L, start) : (VEC(L)){0})

void mo_bias_grad(float *db, const float *dy, int32_t pixels, int32_t c, int accumulate) {
  int32_t j = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    VEC(L) sum = FIRST(L, db + j);                                                       \
    for (int32_t i = j; i < pixels * c; i += c) sum += MO_LOAD(L, dy + i);               \
    MO_STORE(L, db + j, sum);                                                            \
  }
  MO_EACH(j, c, BODY)
#undef BODY
}

void mo_affine_forward(float *y, const float *x, const float *gamma, const float *beta,
                       const float *mean, const float *rstd, int32_t pixels, int32_t c, float lo,
                       float hi) {
  int32_t j = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) scale = MO_LOAD(L, gamma + j) * MO_LOAD(L, rstd + j);                   \
    const VEC(L) shift = MO_LOAD(L, beta + j) - MO_LOAD(L, mean + j) * scale;            \
    for (int32_t i = j; i < pixels * c; i += c) {                                        \
      VEC(L) v = MO_LOAD(L, x + i) * scale + shift;                                      \
      MO_CLAMP(L, v, lo, hi);                                                            \
      MO_STORE(L, y + i, v);                                                             \
    }                                                                                    \
  }
  MO_EACH(j, c, BODY)
#undef BODY
}

void mo_affine_dx(float *dx, const float *dy, const float *gamma, const float *rstd,
                  int32_t pixels, int32_t c) {
  int32_t j = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) scale = MO_LOAD(L, gamma + j) * MO_LOAD(L, rstd + j);                   \
    for (int32_t i = j; i < pixels * c; i += c)                                          \
      MO_STORE(L, dx + i, MO_LOAD(L, dy + i) * scale);                                   \
  }
  MO_EACH(j, c, BODY)
#undef BODY
}

void mo_affine_dgamma(float *dgamma, const float *dy, const float *x, const float *mean,
                      const float *rstd, int32_t pixels, int32_t c, int accumulate) {
  int32_t j = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) shift = MO_LOAD(L, mean + j), scale = MO_LOAD(L, rstd + j);             \
    VEC(L) sum = FIRST(L, dgamma + j);                                                   \
    for (int32_t i = j; i < pixels * c; i += c)                                          \
      sum += MO_LOAD(L, dy + i) * ((MO_LOAD(L, x + i) - shift) * scale);                 \
    MO_STORE(L, dgamma + j, sum);                                                        \
  }
  MO_EACH(j, c, BODY)
#undef BODY
}
