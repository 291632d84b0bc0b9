/* Max and average pooling on [h][w][c]; windows are clipped to the input. */
#include "mo_kernels.h"
#include "mo_tile.h"

enum { SIDE = MO_LANES }; /* channels whose windows are searched side by side */

typedef struct {
  int32_t begin, end; /* taps k in [begin, end) lie inside the input */
  int32_t origin;     /* input position of tap 0, may be negative */
} window_t;

static window_t window(int32_t out, int32_t in, int32_t k, int32_t stride, int32_t pad,
                       int32_t dil) {
  window_t t;
  t.origin = out * stride - pad;
  t.begin = t.origin < 0 ? (-t.origin + dil - 1) / dil : 0;
  t.end = in > t.origin ? (in - t.origin + dil - 1) / dil : 0;
  if (t.end > k) t.end = k;
  return t;
}

static window_t window_rows(const mo_pool_t *g, int32_t oy) {
  return window(oy, g->in_h, g->k_h, g->stride_h, g->pad_t, g->dil_h);
}

static window_t window_cols(const mo_pool_t *g, int32_t ox) {
  return window(ox, g->in_w, g->k_w, g->stride_w, g->pad_l, g->dil_w);
}

/* Maxima of the windows of n channels, and the taps that won.  A NaN wins, so that it is never
   hidden; a window without a single input has the maximum -infinity, at tap 0. */
MO_INLINE void window_max(float *best, int32_t *winner, const float *x, const mo_pool_t *g,
                          window_t row, window_t col, const int32_t n) {
  for (int32_t j = 0; j < n; j++) {
    best[j] = MO_NO_LO;
    winner[j] = -1;
  }
  for (int32_t kh = row.begin; kh < row.end; kh++)
    for (int32_t kw = col.begin; kw < col.end; kw++) {
      const int32_t iy = row.origin + kh * g->dil_h, ix = col.origin + kw * g->dil_w;
      const float *in = x + (iy * g->in_w + ix) * g->c;
      for (int32_t j = 0; j < n; j++) {
        const float v = in[j];
        const int wins = (v > best[j]) | (v != v) | (winner[j] < 0);
        best[j] = wins ? v : best[j];
        winner[j] = wins ? kh * g->k_w + kw : winner[j];
      }
    }
  for (int32_t j = 0; j < n; j++) winner[j] = mo_max(winner[j], 0);
}

void mo_maxpool_forward(float *y, uint8_t *code, const float *x, const mo_pool_t *g, int bits) {
  unsigned pending = 0;
  int used = 0;
  for (int32_t oy = 0; oy < g->out_h; oy++) {
    const window_t row = window_rows(g, oy);
    for (int32_t ox = 0; ox < g->out_w; ox++, y += g->c) {
      const window_t col = window_cols(g, ox);
      for (int32_t j = 0; j < g->c; j += SIDE) {
        const int32_t n = mo_min(SIDE, g->c - j);
        float best[SIDE];
        int32_t winner[SIDE];
        if (n == SIDE)
          window_max(best, winner, x + j, g, row, col, SIDE);
        else
          window_max(best, winner, x + j, g, row, col, n);
        for (int32_t i = 0; i < n; i++) {
          y[j + i] = best[i];
          if (code == NULL) continue;
          pending |= (unsigned)winner[i] << used;
          used += bits;
          if (used == 8) {
            *code++ = (uint8_t)pending;
            pending = 0;
            used = 0;
          }
        }
      }
    }
  }
  if (used > 0) *code = (uint8_t)pending;
}

void mo_maxpool_backward(float *dx, const float *dy, const uint8_t *code, const mo_pool_t *g,
                         int bits) {
  const int32_t n = g->in_h * g->in_w * g->c;
  int used = 0;
  for (int32_t i = 0; i < n; i++) dx[i] = 0.0f;
  for (int32_t oy = 0; oy < g->out_h; oy++)
    for (int32_t ox = 0; ox < g->out_w; ox++)
      for (int32_t j = 0; j < g->c; j++) {
        const int32_t winner = (*code >> used) & ((1 << bits) - 1);
        const int32_t iy = oy * g->stride_h - g->pad_t + winner / g->k_w * g->dil_h;
        const int32_t ix = ox * g->stride_w - g->pad_l + winner % g->k_w * g->dil_w;
        const float d = *dy++;
        used += bits;
        if (used == 8) {
          code++;
          used = 0;
        }
        /* a window without a single input has no winner */
        if (iy < 0 || iy >= g->in_h || ix < 0 || ix >= g->in_w) continue;
        dx[(iy * g->in_w + ix) * g->c + j] += d;
      }
}

static int32_t clipped(int32_t origin, int32_t k, int32_t limit) {
  return (origin + k < limit ? origin + k : limit) - origin;
}

static float window_size(const mo_pool_t *g, window_t row, window_t col, int include_pad,
                         int32_t divisor) {
  if (divisor > 0) return (float)divisor;
  if (!include_pad) return (float)((row.end - row.begin) * (col.end - col.begin));
  return (float)(clipped(row.origin, g->k_h, g->in_h + g->pad_b) *
                 clipped(col.origin, g->k_w, g->in_w + g->pad_r));
}

void mo_avgpool_forward(float *y, const float *x, const mo_pool_t *g, int include_pad,
                        int32_t divisor) {
  for (int32_t oy = 0; oy < g->out_h; oy++) {
    const window_t row = window_rows(g, oy);
    for (int32_t ox = 0; ox < g->out_w; ox++, y += g->c) {
      const window_t col = window_cols(g, ox);
      const float size = window_size(g, row, col, include_pad, divisor);
      for (int32_t j = 0; j < g->c; j++) y[j] = 0.0f;
      for (int32_t kh = row.begin; kh < row.end; kh++)
        for (int32_t kw = col.begin; kw < col.end; kw++) {
          const int32_t iy = row.origin + kh * g->dil_h, ix = col.origin + kw * g->dil_w;
          const float *in = x + (iy * g->in_w + ix) * g->c;
          for (int32_t j = 0; j < g->c; j++) y[j] += in[j];
        }
      for (int32_t j = 0; j < g->c; j++) y[j] /= size;
    }
  }
}

void mo_avgpool_backward(float *dx, const float *dy, const mo_pool_t *g, int include_pad,
                         int32_t divisor) {
  const int32_t n = g->in_h * g->in_w * g->c;
  for (int32_t i = 0; i < n; i++) dx[i] = 0.0f;
  for (int32_t oy = 0; oy < g->out_h; oy++) {
    const window_t row = window_rows(g, oy);
    for (int32_t ox = 0; ox < g->out_w; ox++, dy += g->c) {
      const window_t col = window_cols(g, ox);
      const float size = window_size(g, row, col, include_pad, divisor);
      for (int32_t kh = row.begin; kh < row.end; kh++)
        for (int32_t kw = col.begin; kw < col.end; kw++) {
          const int32_t iy = row.origin + kh * g->dil_h, ix = col.origin + kw * g->dil_w;
          float *out = dx + (iy * g->in_w + ix) * g->c;
          for (int32_t j = 0; j < g->c; j++) out[j] += dy[j] / size;
        }
    }
  }
}

static int32_t span_begin(int32_t i, int32_t in, int32_t out) { return i * in / out; }
static int32_t span_end(int32_t i, int32_t in, int32_t out) {
  return ((i + 1) * in + out - 1) / out;
}

void mo_adaptive_avgpool_forward(float *y, const float *x, int32_t in_h, int32_t in_w,
                                 int32_t out_h, int32_t out_w, int32_t c) {
  for (int32_t oy = 0; oy < out_h; oy++)
    for (int32_t ox = 0; ox < out_w; ox++, y += c) {
      const int32_t y0 = span_begin(oy, in_h, out_h), y1 = span_end(oy, in_h, out_h);
      const int32_t x0 = span_begin(ox, in_w, out_w), x1 = span_end(ox, in_w, out_w);
      const float size = (float)((y1 - y0) * (x1 - x0));
      for (int32_t j = 0; j < c; j++) y[j] = 0.0f;
      for (int32_t iy = y0; iy < y1; iy++)
        for (int32_t ix = x0; ix < x1; ix++) {
          const float *in = x + (iy * in_w + ix) * c;
          for (int32_t j = 0; j < c; j++) y[j] += in[j];
        }
      for (int32_t j = 0; j < c; j++) y[j] /= size;
    }
}

void mo_adaptive_avgpool_backward(float *dx, const float *dy, int32_t in_h, int32_t in_w,
                                  int32_t out_h, int32_t out_w, int32_t c) {
  for (int32_t i = 0; i < in_h * in_w * c; i++) dx[i] = 0.0f;
  for (int32_t oy = 0; oy < out_h; oy++)
    for (int32_t ox = 0; ox < out_w; ox++, dy += c) {
      const int32_t y0 = span_begin(oy, in_h, out_h), y1 = span_end(oy, in_h, out_h);
      const int32_t x0 = span_begin(ox, in_w, out_w), x1 = span_end(ox, in_w, out_w);
      const float size = (float)((y1 - y0) * (x1 - x0));
      for (int32_t iy = y0; iy < y1; iy++)
        for (int32_t ix = x0; ix < x1; ix++) {
          float *out = dx + (iy * in_w + ix) * c;
          for (int32_t j = 0; j < c; j++) out[j] += dy[j] / size;
        }
    }
}
