/* Channel attention: gates, and gradients of the channels that they let through.  A gate of 0 is a
   channel that is left out; `most` bounds how many are looked at, whatever the gates hold. */
#include <string.h>

#include "mo_kernels.h"

#define LITTLE 1e-12f

static float magnitude(float x) {
  return x < 0.0f ? -x : x;
}

void mo_magnitudes(float *sums, const float *x, int32_t pixels, int32_t c) {
  for (int32_t i = 0; i < pixels; i++, x += c)
    for (int32_t j = 0; j < c; j++) sums[j] += magnitude(x[j]);
}

/* y = w x + b, [rows][columns] */
static void dense(float *y, const float *x, const float *w, const float *b, int32_t rows,
                  int32_t columns) {
  for (int32_t r = 0; r < rows; r++, w += columns) {
    float sum = b[r];
    for (int32_t j = 0; j < columns; j++) sum += w[j] * x[j];
    y[r] = sum;
  }
}

static void softmax(float *s, int32_t n) {
  float max = s[0], sum = 0.0f;
  for (int32_t j = 1; j < n; j++) max = s[j] > max ? s[j] : max;
  for (int32_t j = 0; j < n; j++) {
    s[j] = mo_exp(s[j] - max);
    sum += s[j];
  }
  for (int32_t j = 0; j < n; j++) s[j] /= sum;
}

/* The largest scores until their sum exceeds rho, all if it is 1, which a sum may round to more
   than; of equal ones the first.  Returns how many, marks
   them with 1 in kept[], and *total is their sum. */
static int32_t keep_largest(float *kept, const float *s, int32_t n, float rho, int32_t most,
                            float *total) {
  int32_t count = 0;
  memset(kept, 0, (size_t)n * sizeof *kept);
  for (*total = 0.0f; count < most && (rho >= 1.0f || *total <= rho); count++) {
    int32_t largest = -1;
    for (int32_t j = 0; j < n; j++)
      if (kept[j] == 0.0f && (largest < 0 || s[j] > s[largest])) largest = j;
    kept[largest] = 1.0f;
    *total += s[largest];
  }
  return count;
}

void mo_gates(float *gates, float *sums, float *hidden, const float *down, const float *down_bias,
              const float *up, const float *up_bias, int32_t channels, int32_t width, float scale,
              float rho, int32_t most) {
  float mean = 0.0f, total;
  for (int32_t j = 0; j < channels; j++) {
    sums[j] *= scale;
    mean += sums[j];
  }
  mean = mean / (float)channels + LITTLE;
  for (int32_t j = 0; j < channels; j++) sums[j] /= mean;
  dense(hidden, sums, down, down_bias, width, channels);
  for (int32_t j = 0; j < width; j++) hidden[j] = hidden[j] > 0.0f ? hidden[j] : 0.0f;
  dense(gates, hidden, up, up_bias, channels, width);
  softmax(gates, channels);
  const int32_t count = keep_largest(sums, gates, channels, rho, most, &total);
  for (int32_t j = 0; j < channels; j++)
    gates[j] = sums[j] > 0.0f ? gates[j] * ((float)count / total) : 0.0f;
}

/* The next channel from j on that a gate lets through, n past the last; without gates each is. */
static int32_t next(const float *gates, int32_t j, int32_t n) {
  while (gates != NULL && j < n && gates[j] == 0.0f) j++;
  return j;
}

static int32_t let_through(const float *gates, int32_t n, int32_t most) {
  int32_t count = 0;
  for (int32_t j = next(gates, 0, n); j < n && count < most; j = next(gates, j + 1, n)) count++;
  return count;
}

void mo_gather_gated(float *dst, const float *src, const float *gates, int32_t rows, int32_t c,
                     int32_t most) {
  const int32_t count = let_through(gates, c, most);
  int32_t j = -1;
  for (int32_t k = 0; k < count; k++) {
    j = next(gates, j + 1, c);
    for (int32_t r = 0; r < rows; r++) dst[r * count + k] = src[r * c + j];
  }
}

void mo_gated_bias_grad(float *db, const float *dy, const float *gates, int32_t pixels, int32_t c,
                        int32_t most, int accumulate) {
  const int32_t count = let_through(gates, c, most);
  int32_t j = -1;
  for (int32_t k = 0; k < count; k++) {
    j = next(gates, j + 1, c);
    float sum = accumulate ? db[k] : 0.0f;
    for (int32_t i = 0; i < pixels; i++) sum += dy[i * c + j];
    db[k] = sum;
  }
}

void mo_gated_dw(float *dw, const float *dy, const float *x, const float *fw, const float *bw,
                 const mo_conv_t *geometry, int32_t most_in, int32_t most_out, int accumulate) {
  mo_conv_t g = *geometry;
  const int32_t count = let_through(bw, g.out_c, most_out);
  if (g.groups == 1) {
    g.in_c = let_through(fw, g.in_c, most_in);
    g.out_c = count;
    if (g.in_c > 0) mo_conv2d_dw(dw, dy, x, &g, 0, count, accumulate);
    return;
  }
  const int32_t row = g.k_h * g.k_w * (g.in_c / g.groups);
  int32_t o = -1;
  for (int32_t k = 0; k < count; k++) {
    o = next(bw, o + 1, g.out_c);
    mo_conv2d_dw(dw + k * row, dy, x, geometry, o, o + 1, accumulate);
  }
}

void mo_gated_step(float *w, const float *g, const float *fw, const float *bw, int32_t rows,
                   int32_t taps, int32_t columns, int32_t row, int32_t tap, int32_t most_out,
                   int32_t most_in, float lr) {
  const int32_t n_out = let_through(bw, rows, most_out), n_in = let_through(fw, columns, most_in);
  int32_t o = -1;
  for (int32_t a = 0; a < n_out; a++) {
    o = next(bw, o + 1, rows);
    for (int32_t t = 0; t < taps; t++) {
      float *part = w + o * row + t * tap;
      int32_t i = -1;
      for (int32_t b = 0; b < n_in; b++) {
        i = next(fw, i + 1, columns);
        const float gated = *g++ * (bw != NULL ? bw[o] : 1.0f);
        part[i] -= lr * (gated * (fw != NULL ? fw[i] : 1.0f));
      }
    }
  }
}
