#include "mo_kernels.h"

void mo_depthwise_forward(float *y, const float *x, const float *w, const float *b,
                          const mo_conv_t *g, float lo, float hi) {
  const int32_t c = g->out_c;
  for (int32_t oy = 0; oy < g->out_h; oy++)
    for (int32_t ox = 0; ox < g->out_w; ox++) {
      float *out = y + (oy * g->out_w + ox) * c;
      for (int32_t j = 0; j < c; j++) out[j] = b ? b[j] : 0.0f;
      for (int32_t kh = 0; kh < g->k_h; kh++)
        for (int32_t kw = 0; kw < g->k_w; kw++) {
          const int32_t iy = oy * g->stride_h - g->pad_t + kh * g->dil_h;
          const int32_t ix = ox * g->stride_w - g->pad_l + kw * g->dil_w;
          if (iy < 0 || iy >= g->in_h || ix < 0 || ix >= g->in_w) continue;
          const float *xp = x + (iy * g->in_w + ix) * c, *wp = w + (kh * g->k_w + kw) * c;
          for (int32_t j = 0; j < c; j++) out[j] += xp[j] * wp[j];
        }
      for (int32_t j = 0; j < c; j++) {
        const float v = out[j] < lo ? lo : out[j];
        out[j] = v > hi ? hi : v;
      }
    }
}

void mo_depthwise_dx(float *dx, const float *dy, const float *w, const mo_conv_t *g,
                     int accumulate) {
  const int32_t c = g->out_c;
  for (int32_t iy = 0; iy < g->in_h; iy++)
    for (int32_t ix = 0; ix < g->in_w; ix++) {
      float *out = dx + (iy * g->in_w + ix) * c;
      if (!accumulate)
        for (int32_t j = 0; j < c; j++) out[j] = 0.0f;
      for (int32_t kh = 0; kh < g->k_h; kh++)
        for (int32_t kw = 0; kw < g->k_w; kw++) {
          const int32_t sy = iy + g->pad_t - kh * g->dil_h, sx = ix + g->pad_l - kw * g->dil_w;
          if (sy < 0 || sx < 0 || sy % g->stride_h != 0 || sx % g->stride_w != 0) continue;
          const int32_t oy = sy / g->stride_h, ox = sx / g->stride_w;
          if (oy >= g->out_h || ox >= g->out_w) continue;
          const float *dp = dy + (oy * g->out_w + ox) * c, *wp = w + (kh * g->k_w + kw) * c;
          for (int32_t j = 0; j < c; j++) out[j] += dp[j] * wp[j];
        }
    }
}

void mo_depthwise_dw(float *dw, const float *dy, const float *x, const mo_conv_t *g, int32_t row0,
                     int32_t row1, int accumulate) {
  const int32_t c = g->out_c;
  for (int32_t kh = row0; kh < row1; kh++)
    for (int32_t kw = 0; kw < g->k_w; kw++) {
      float *out = dw + ((kh - row0) * g->k_w + kw) * c;
      if (!accumulate)
        for (int32_t j = 0; j < c; j++) out[j] = 0.0f;
      for (int32_t oy = 0; oy < g->out_h; oy++)
        for (int32_t ox = 0; ox < g->out_w; ox++) {
          const int32_t iy = oy * g->stride_h - g->pad_t + kh * g->dil_h;
          const int32_t ix = ox * g->stride_w - g->pad_l + kw * g->dil_w;
          if (iy < 0 || iy >= g->in_h || ix < 0 || ix >= g->in_w) continue;
          const float *dp = dy + (oy * g->out_w + ox) * c, *xp = x + (iy * g->in_w + ix) * c;
          for (int32_t j = 0; j < c; j++) out[j] += dp[j] * xp[j];
        }
    }
}
