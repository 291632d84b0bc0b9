/* Depthwise convolutions.  The forward pass and dX are the same stencil along a row of pixels; for
   dX it walks back through dy, once for each phase of the stride. */
#include "mo_depthwise.h"
#include "mo_kernels.h"

void mo_depthwise_forward(float *y, const float *x, const float *w, const float *b,
                          const mo_conv_t *g, float lo, float hi) {
  mo_stencil_t s = {0};
  s.c = g->in_c;
  s.bias = b;
  s.count = g->out_w;
  s.out_step = s.c;
  s.x0 = -g->pad_l;
  s.step = g->stride_w;
  s.tap = g->dil_w;
  s.taps = g->k_w;
  s.in_w = g->in_w;
  s.in_row = g->dil_h * g->in_w * s.c;
  s.w_row = g->k_w * s.c;
  s.w_tap = s.c;
  s.clamp = lo > MO_NO_LO || hi < MO_NO_HI;
  s.lo = lo;
  s.hi = hi;
  for (int32_t oy = 0; oy < g->out_h; oy++) {
    const int32_t iy = oy * g->stride_h - g->pad_t;
    const mo_range_t rows = mo_taps_inside(iy, g->dil_h, g->k_h, g->in_h);
    s.rows = rows.end - rows.begin;
    s.out = y + oy * g->out_w * s.c;
    s.in = x;
    s.w = w + rows.begin * s.w_row;
    if (s.rows > 0) s.in += (iy + rows.begin * g->dil_h) * g->in_w * s.c;
    mo_stencil_row(&s);
  }
}

/* The taps of one dimension that reach input i, which are every `step`-th from `first`; tap
   number n of them comes from output out - n * back. */
typedef struct {
  int32_t first, step, count, out, back;
} phase_t;

static phase_t phase_of(int32_t i, int32_t k, int32_t stride, int32_t pad, int32_t dil) {
  phase_t t;
  t.first = 0;
  while (t.first < k && (i + pad - t.first * dil) % stride != 0) t.first++;
  t.step = 1;
  while (t.step * dil % stride != 0) t.step++;
  t.count = t.first < k ? mo_ceil_div(k - t.first, t.step) : 0;
  t.out = (i + pad - t.first * dil) / stride;
  t.back = t.step * dil / stride;
  return t;
}

void mo_depthwise_dx(float *dx, const float *dy, const float *w, const mo_conv_t *g,
                     int accumulate) {
  mo_stencil_t s = {0};
  s.c = g->in_c;
  s.out_step = g->stride_w * s.c;
  s.step = 1;
  s.in_w = g->out_w;
  s.accumulate = accumulate;
  for (int32_t iy = 0; iy < g->in_h; iy++) {
    const phase_t row = phase_of(iy, g->k_h, g->stride_h, g->pad_t, g->dil_h);
    const mo_range_t rows = mo_taps_inside(row.out, -row.back, row.count, g->out_h);
    s.rows = rows.end - rows.begin;
    s.in = dy;
    if (s.rows > 0) s.in += (row.out - rows.begin * row.back) * g->out_w * s.c;
    s.in_row = -row.back * g->out_w * s.c;
    s.w_row = row.step * g->k_w * s.c;
    for (int32_t ix = 0; ix < mo_min(g->stride_w, g->in_w); ix++) {
      const phase_t col = phase_of(ix, g->k_w, g->stride_w, g->pad_l, g->dil_w);
      s.out = dx + (iy * g->in_w + ix) * s.c;
      s.count = mo_ceil_div(g->in_w - ix, g->stride_w);
      s.x0 = col.out;
      s.tap = -col.back;
      s.taps = col.count;
      s.w = w;
      if (s.rows > 0 && s.taps > 0)
        s.w += ((row.first + rows.begin * row.step) * g->k_w + col.first) * s.c;
      s.w_tap = col.step * s.c;
      mo_stencil_row(&s);
    }
  }
}

void mo_depthwise_dw(float *dw, const float *dy, const float *x, const mo_conv_t *g, int32_t row0,
                     int32_t row1, int accumulate) {
  mo_taps_t s = {0};
  s.c = g->in_c;
  s.step = g->stride_w;
  s.tap = g->dil_w;
  s.in_w = g->in_w;
  s.out_w = g->out_w;
  s.x_row = g->stride_h * g->in_w * s.c;
  s.accumulate = accumulate;
  for (int32_t kh = row0; kh < row1; kh++) {
    const int32_t iy = kh * g->dil_h - g->pad_t;
    const mo_range_t seen = mo_outputs_inside(iy, g->stride_h, g->in_h, g->out_h);
    s.rows = seen.end - seen.begin;
    s.dy = dy + seen.begin * g->out_w * s.c;
    s.x = x;
    if (s.rows > 0) s.x += (seen.begin * g->stride_h + iy) * g->in_w * s.c;
    for (int32_t kw = 0; kw < g->k_w; kw += s.taps) {
      s.taps = mo_tile_taps(g->k_w - kw);
      s.x0 = kw * s.tap - g->pad_l;
      s.dw = dw + ((kh - row0) * g->k_w + kw) * s.c;
      mo_taps(&s);
    }
  }
}
