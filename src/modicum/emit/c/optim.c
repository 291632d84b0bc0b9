/* Update rules, in place over n contiguous floats. */
#include "mo_kernels.h"
#include "mo_tile.h"

void mo_sgd(float *w, const float *g, int32_t n, float lr, float weight_decay) {
  for (int32_t i = 0; i < n; i++) w[i] -= lr * (g[i] + weight_decay * w[i]);
}

void mo_momentum(float *w, const float *g, float *v, int32_t n, float lr, float momentum,
                 float weight_decay) {
  for (int32_t i = 0; i < n; i++) {
    v[i] = momentum * v[i] + (g[i] + weight_decay * w[i]);
    w[i] -= lr * v[i];
  }
}

void mo_adam(float *w, const float *g, float *m, float *v, int32_t n, float lr, float beta1,
             float beta2, float eps, float c1, float c2, float weight_decay) {
  for (int32_t i = 0; i < n; i++) {
    const float grad = g[i] + weight_decay * w[i];
    m[i] = beta1 * m[i] + (1.0f - beta1) * grad;
    v[i] = beta2 * v[i] + (1.0f - beta2) * grad * grad;
    w[i] -= lr * (m[i] / c1) / (mo_square_root(v[i] / c2) + eps);
  }
}

/* 1 - (1 - c)^n for n > 0, by squaring: sum, c and what they become are all of that form. */
static float correction(uint32_t n, float c) {
  float sum = 0.0f;
  for (; n > 0u; n >>= 1) {
    if ((n & 1u) != 0u) sum += (1.0f - sum) * c;
    c += (1.0f - c) * c;
  }
  return sum;
}

void mo_adam_counted(float *w, const float *g, float *m, float *v, int32_t n, float lr,
                     float beta1, float beta2, float eps, uint32_t t, float weight_decay) {
  const float c1 = correction(t, 1.0f - beta1), c2 = correction(t, 1.0f - beta2);
  mo_adam(w, g, m, v, n, lr, beta1, beta2, eps, c1, c2, weight_decay);
}
