/* Cosine similarity to prototypes, and the Fisher scores of a value's channels. */
#include "mo_kernels.h"
#include "mo_tile.h"

#define VEC(L) MO_JOIN(mo_f, L)
#define SHORTEST 1e-8f

static float dot(const float *a, const float *b, int32_t n) {
  float sum = 0.0f;
  for (int32_t j = 0; j < n; j++) sum += a[j] * b[j];
  return sum;
}

static float length(const float *v, int32_t n) {
  const float root = mo_square_root(dot(v, v, n));
  return root > SHORTEST ? root : SHORTEST;
}

void mo_cosine_forward(float *y, const float *x, const float *prototypes, const float *scale,
                       const float *bias, int32_t features, int32_t ways) {
  const float n = length(x, features);
  for (int32_t k = 0; k < ways; k++) {
    const float *c = prototypes + k * features;
    y[k] = scale[0] * (dot(x, c, features) / (n * length(c, features)) + bias[0]);
  }
}

void mo_cosine_dx(float *dx, const float *dy, const float *x, const float *prototypes,
                  const float *scale, int32_t features, int32_t ways, int accumulate) {
  const float n = length(x, features);
  float along = 0.0f;
  for (int32_t k = 0; k < ways; k++) {
    const float *c = prototypes + k * features;
    const float w = scale[0] * dy[k] / (n * length(c, features));
    along += w * dot(x, c, features);
    for (int32_t j = 0; j < features; j++) {
      dx[j] = (k > 0 || accumulate ? dx[j] : 0.0f) + w * c[j];
    }
  }
  if (n > SHORTEST) {
    const float back = along / (n * n);
    for (int32_t j = 0; j < features; j++) dx[j] -= back * x[j];
  }
}

int mo_prototype_add(float *prototypes, const float *x, int32_t label, int32_t features) {
  float *c = prototypes + label * features;
  for (int32_t j = 0; j < features; j++) {
    const float sum = c[j] + x[j];
    if (!mo_all_finite(&sum, 1)) return 0;
  }
  for (int32_t j = 0; j < features; j++) c[j] += x[j];
  return 1;
}

void mo_fisher(float *score, const float *dy, const float *x, int32_t pixels, int32_t c,
               int accumulate) {
  int32_t j = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    VEC(L) sum = {0};                                                                    \
    for (int32_t i = j; i < pixels * c; i += c) {                                        \
      sum += MO_LOAD(L, dy + i) * MO_LOAD(L, x + i);                                     \
    }                                                                                    \
    const VEC(L) before = accumulate ? MO_LOAD(L, score + j) : (VEC(L)){0};              \
    MO_STORE(L, score + j, before + 0.5f * (sum * sum));                                 \
  }
  MO_EACH(j, c, BODY)
#undef BODY
}
