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
