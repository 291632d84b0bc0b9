/* Batch norm and group norm with the statistics of the sample at hand, the gradient of a trained
   norm that is fused into a convolution, and standardised weights. */
#include "mo_kernels.h"
#include "mo_tile.h"

#define VEC(L) MO_JOIN(mo_f, L)
#define FIRST(L, start) (accumulate ? MO_LOAD(L, start) : (VEC(L)){0})

static float reciprocal_root(float variance, float eps) {
  return 1.0f / mo_square_root(variance + eps);
}

/* ---- batch norm ---- */

void mo_batch_norm_forward(float *y, const float *x, const float *gamma, const float *beta,
                           const float *running_mean, const float *running_var, float *stats,
                           int32_t pixels, int32_t c, float eps, float lo, float hi) {
  const float count = (float)pixels;
  int32_t j = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    VEC(L) mean, var;                                                                    \
    float rstd[L];                                                                       \
    if (stats != NULL) {                                                                 \
      VEC(L) sum = {0}, squares = {0};                                                   \
      for (int32_t i = j; i < pixels * c; i += c) sum += MO_LOAD(L, x + i);              \
      mean = sum / count;                                                                \
      for (int32_t i = j; i < pixels * c; i += c) {                                      \
        const VEC(L) d = MO_LOAD(L, x + i) - mean;                                       \
        squares += d * d;                                                                \
      }                                                                                  \
      var = squares / count;                                                             \
    } else {                                                                             \
      mean = MO_LOAD(L, running_mean + j);                                               \
      var = MO_LOAD(L, running_var + j);                                                 \
    }                                                                                    \
    MO_STORE(L, rstd, var);                                                              \
    for (int k = 0; k < L; k++) rstd[k] = reciprocal_root(rstd[k], eps);                 \
    if (stats != NULL) {                                                                 \
      MO_STORE(L, stats + j, mean);                                                      \
      MO_STORE(L, stats + c + j, MO_LOAD(L, rstd));                                      \
    }                                                                                    \
    const VEC(L) scale = MO_LOAD(L, rstd) * MO_LOAD(L, gamma + j);                       \
    const VEC(L) shift = MO_LOAD(L, beta + j);                                           \
    for (int32_t i = j; i < pixels * c; i += c) {                                        \
      VEC(L) v = (MO_LOAD(L, x + i) - mean) * scale + shift;                             \
      MO_CLAMP(L, v, lo, hi);                                                            \
      MO_STORE(L, y + i, v);                                                             \
    }                                                                                    \
  }
  MO_EACH(j, c, BODY)
#undef BODY
}

void mo_batch_norm_follow(float *running_mean, float *running_var, const float *stats,
                          int32_t pixels, int32_t c, float eps, float momentum) {
  const float unbiased = (float)pixels / (float)(pixels - 1);
  for (int32_t j = 0; j < c; j++) {
    const float rstd = stats[c + j], var = 1.0f / (rstd * rstd) - eps;
    running_mean[j] = (1.0f - momentum) * running_mean[j] + momentum * stats[j];
    running_var[j] =
        (1.0f - momentum) * running_var[j] + momentum * unbiased * (var > 0.0f ? var : 0.0f);
  }
}

/* dx = scale * (dy - mean of dy - xhat * mean of dy * xhat) */
void mo_batch_norm_dx(float *dx, const float *dy, const float *x, const float *gamma,
                      const float *stats, int32_t pixels, int32_t c) {
  const float count = (float)pixels;
  int32_t j = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) mean = MO_LOAD(L, stats + j), rstd = MO_LOAD(L, stats + c + j);         \
    const VEC(L) scale = MO_LOAD(L, gamma + j) * rstd;                                   \
    VEC(L) sum = {0}, along = {0};                                                       \
    for (int32_t i = j; i < pixels * c; i += c) {                                        \
      const VEC(L) d = MO_LOAD(L, dy + i);                                               \
      sum += d;                                                                          \
      along += d * ((MO_LOAD(L, x + i) - mean) * rstd);                                  \
    }                                                                                    \
    sum = sum / count;                                                                   \
    along = along / count;                                                               \
    for (int32_t i = j; i < pixels * c; i += c) {                                        \
      const VEC(L) xhat = (MO_LOAD(L, x + i) - mean) * rstd;                             \
      MO_STORE(L, dx + i, scale * (MO_LOAD(L, dy + i) - sum - xhat * along));            \
    }                                                                                    \
  }
  MO_EACH(j, c, BODY)
#undef BODY
}

/* ---- group norm: a sum over a group is the sum over its channels of their sums over pixels,
        which are formed side by side ---- */

/* += the lanes of a vector, in order */
#define ADD_LANES(L, total, lanes)                \
  {                                               \
    float each[L];                                \
    MO_STORE(L, each, lanes);                     \
    for (int k = 0; k < L; k++) total += each[k]; \
  }

static float group_mean(const float *x, int32_t pixels, int32_t c, int32_t size) {
  float total = 0.0f;
  int32_t j = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    VEC(L) sum = {0};                                                                    \
    for (int32_t i = j; i < pixels * c; i += c) sum += MO_LOAD(L, x + i);                \
    ADD_LANES(L, total, sum)                                                             \
  }
  MO_EACH(j, size, BODY)
#undef BODY
  return total / (float)(pixels * size);
}

static float group_variance(const float *x, float mean, int32_t pixels, int32_t c, int32_t size) {
  float total = 0.0f;
  int32_t j = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    VEC(L) sum = {0};                                                                    \
    for (int32_t i = j; i < pixels * c; i += c) {                                        \
      const VEC(L) d = MO_LOAD(L, x + i) - mean;                                         \
      sum += d * d;                                                                      \
    }                                                                                    \
    ADD_LANES(L, total, sum)                                                             \
  }
  MO_EACH(j, size, BODY)
#undef BODY
  return total / (float)(pixels * size);
}

void mo_group_norm_forward(float *y, const float *x, const float *gamma, const float *beta,
                           float *stats, int32_t pixels, int32_t c, int32_t groups, float eps,
                           float lo, float hi) {
  const int32_t size = c / groups;
  for (int32_t g = 0; g < groups; g++) {
    const int32_t end = (g + 1) * size;
    int32_t j = g * size;
    const float mean = group_mean(x + j, pixels, c, size);
    const float rstd = reciprocal_root(group_variance(x + j, mean, pixels, c, size), eps);
    if (stats != NULL) {
      stats[g] = mean;
      stats[groups + g] = rstd;
    }
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) scale = gamma ? MO_LOAD(L, gamma + j) * rstd : MO_SPREAD(L, rstd);      \
    const VEC(L) shift = beta ? MO_LOAD(L, beta + j) : (VEC(L)){0};                      \
    for (int32_t i = j; i < pixels * c; i += c) {                                        \
      VEC(L) v = (MO_LOAD(L, x + i) - mean) * scale + shift;                             \
      MO_CLAMP(L, v, lo, hi);                                                            \
      MO_STORE(L, y + i, v);                                                             \
    }                                                                                    \
  }
    MO_EACH(j, end, BODY)
#undef BODY
  }
}

/* with h = dy * gamma: dx = rstd * (h - mean of h - xhat * mean of h * xhat) */
void mo_group_norm_dx(float *dx, const float *dy, const float *x, const float *gamma,
                      const float *stats, int32_t pixels, int32_t c, int32_t groups) {
  const int32_t size = c / groups;
  const float count = (float)(pixels * size);
  for (int32_t g = 0; g < groups; g++) {
    const int32_t begin = g * size, end = begin + size;
    const float mean = stats[g], rstd = stats[groups + g];
    float total = 0.0f, total_along = 0.0f;
    int32_t j = begin;
#define GAMMA(L) (gamma ? MO_LOAD(L, gamma + j) : MO_SPREAD(L, 1.0f))
#define BODY(L)                                                                          \
  {                                                                                      \
    VEC(L) sum = {0}, along = {0};                                                       \
    for (int32_t i = j; i < pixels * c; i += c) {                                        \
      const VEC(L) d = MO_LOAD(L, dy + i);                                               \
      sum += d;                                                                          \
      along += d * ((MO_LOAD(L, x + i) - mean) * rstd);                                  \
    }                                                                                    \
    ADD_LANES(L, total, sum * GAMMA(L))                                                  \
    ADD_LANES(L, total_along, along * GAMMA(L))                                          \
  }
    MO_EACH(j, end, BODY)
#undef BODY
    total /= count;
    total_along /= count;
    j = begin;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) scale = GAMMA(L);                                                       \
    for (int32_t i = j; i < pixels * c; i += c) {                                        \
      const VEC(L) xhat = (MO_LOAD(L, x + i) - mean) * rstd;                             \
      const VEC(L) d = MO_LOAD(L, dy + i) * scale;                                       \
      MO_STORE(L, dx + i, (d - total - xhat * total_along) * rstd);                      \
    }                                                                                    \
  }
    MO_EACH(j, end, BODY)
#undef BODY
#undef GAMMA
  }
}

void mo_group_norm_dgamma(float *dgamma, const float *dy, const float *x, const float *stats,
                          int32_t pixels, int32_t c, int32_t groups, int accumulate) {
  const int32_t size = c / groups;
  for (int32_t g = 0; g < groups; g++) {
    const int32_t end = (g + 1) * size;
    const float mean = stats[g], rstd = stats[groups + g];
    int32_t j = g * size;
#define BODY(L)                                                                          \
  {                                                                                      \
    VEC(L) sum = FIRST(L, dgamma + j);                                                   \
    for (int32_t i = j; i < pixels * c; i += c)                                          \
      sum += MO_LOAD(L, dy + i) * ((MO_LOAD(L, x + i) - mean) * rstd);                   \
    MO_STORE(L, dgamma + j, sum);                                                        \
  }
    MO_EACH(j, end, BODY)
#undef BODY
  }
}

/* ---- a trained scale behind a convolution.  With y = gamma * (conv(x, w) + bias - mean) * rstd,
        dgamma = rstd * (sum of dy * conv(x, w) + (bias - mean) * sum of dy), and the first sum is
        the product of w with g, the gradient of a convolution by w alone that yields y ---- */

void mo_norm_dgamma_start(float *dgamma, const float *dy, const float *mean, const float *rstd,
                          const float *bias, int32_t pixels, int32_t c, int accumulate) {
  int32_t j = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) start = bias ? MO_LOAD(L, bias + j) : (VEC(L)){0};                      \
    VEC(L) sum = {0};                                                                    \
    for (int32_t i = j; i < pixels * c; i += c) sum += MO_LOAD(L, dy + i);               \
    sum *= (start - MO_LOAD(L, mean + j)) * MO_LOAD(L, rstd + j);                        \
    MO_STORE(L, dgamma + j, FIRST(L, dgamma + j) + sum);                                 \
  }
  MO_EACH(j, c, BODY)
#undef BODY
}

void mo_norm_dw_rows(float *g, float *dgamma, const float *w, const float *gamma,
                     const float *rstd, int32_t row0, int32_t row1, int32_t row_elems) {
  for (int32_t r = row0; r < row1; r++, g += row_elems, w += row_elems) {
    const float scale = gamma[r] * rstd[r];
    float dot = 0.0f;
    for (int32_t i = 0; i < row_elems; i++) {
      dot += w[i] * g[i];
      g[i] *= scale;
    }
    dgamma[r] += rstd[r] * dot;
  }
}

void mo_norm_dw_channels(float *g, float *dgamma, const float *w, const float *gamma,
                         const float *rstd, int32_t taps, int32_t c) {
  int32_t j = 0;
#define BODY(L)                                                                          \
  {                                                                                      \
    const VEC(L) scale = MO_LOAD(L, gamma + j) * MO_LOAD(L, rstd + j);                   \
    VEC(L) dot = {0};                                                                    \
    for (int32_t i = j; i < taps * c; i += c) {                                          \
      const VEC(L) d = MO_LOAD(L, g + i);                                                \
      dot += MO_LOAD(L, w + i) * d;                                                      \
      MO_STORE(L, g + i, d * scale);                                                     \
    }                                                                                    \
    MO_STORE(L, dgamma + j, MO_LOAD(L, dgamma + j) + MO_LOAD(L, rstd + j) * dot);        \
  }
  MO_EACH(j, c, BODY)
#undef BODY
}

/* ---- standardised weights ---- */

typedef struct {
  float mean, rstd;
} moments_t;

static moments_t moments(const float *w, int32_t n, float eps) {
  moments_t m;
  float sum = 0.0f, squares = 0.0f;
  for (int32_t i = 0; i < n; i++) sum += w[i];
  m.mean = sum / (float)n;
  for (int32_t i = 0; i < n; i++) squares += (w[i] - m.mean) * (w[i] - m.mean);
  m.rstd = reciprocal_root(squares / (float)n, eps);
  return m;
}

void mo_standardise(float *out, const float *w, int32_t rows, int32_t row_elems, float eps) {
  for (int32_t r = 0; r < rows; r++, out += row_elems, w += row_elems) {
    const moments_t m = moments(w, row_elems, eps);
    for (int32_t i = 0; i < row_elems; i++) out[i] = (w[i] - m.mean) * m.rstd;
  }
}

void mo_standardise_dw(float *g, const float *w, int32_t rows, int32_t row_elems, float eps) {
  for (int32_t r = 0; r < rows; r++, g += row_elems, w += row_elems) {
    const moments_t m = moments(w, row_elems, eps);
    float sum = 0.0f, along = 0.0f;
    for (int32_t i = 0; i < row_elems; i++) {
      sum += g[i];
      along += g[i] * ((w[i] - m.mean) * m.rstd);
    }
    sum /= (float)row_elems;
    along /= (float)row_elems;
    for (int32_t i = 0; i < row_elems; i++)
      g[i] = m.rstd * (g[i] - sum - (w[i] - m.mean) * m.rstd * along);
  }
}
