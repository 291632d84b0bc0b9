/* Update rules, in place over n contiguous floats. */
#include "mo_kernels.h"

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

#if defined(__GNUC__)
static float square_root(float x) { return __builtin_sqrtf(x); }
#else
/* Newton's iteration; from max(x, 1) it only falls, and stops at the root */
static float square_root(float x) {
  float r = x > 1.0f ? x : 1.0f;
  for (float next = 0.5f * (r + x / r); next < r; next = 0.5f * (r + x / r)) r = next;
  return r;
}
#endif

void mo_adam(float *w, const float *g, float *m, float *v, int32_t n, float lr, float beta1,
             float beta2, float eps, float c1, float c2, float weight_decay) {
  for (int32_t i = 0; i < n; i++) {
    const float grad = g[i] + weight_decay * w[i];
    m[i] = beta1 * m[i] + (1.0f - beta1) * grad;
    v[i] = beta2 * v[i] + (1.0f - beta2) * grad * grad;
    w[i] -= lr * (m[i] / c1) / (square_root(v[i] / c2) + eps);
  }
}
