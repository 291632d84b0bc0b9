/* Depthwise convolutions: lanes lie along the channels.  The forward pass and dX are the same
   stencil along a row of pixels,

       out[p] = start + sum over rows i and taps j of in[i][x0 + p * step + j * tap] w[i][j],

   which for dX walks back through dy, once for each phase of the stride. */
#include "mo_kernels.h"
#include "mo_tile.h"

typedef struct {
  float *out;
  const float *in, *w, *bias; /* of the first row; bias may be NULL */
  int32_t count, out_step;    /* outputs, and floats from one to the next */
  int32_t x0, step, tap, in_w; /* columns of the input, of which those in [0, in_w) exist */
  int32_t rows, taps;
  int32_t in_row, w_row, w_tap; /* floats */
  int32_t c;
  int accumulate, clamp;
  float lo, hi;
} stencil_t;

/* dw[t] = sum over rows and outputs p of dy[row][p] x[row][x0 + p * step + t * tap] */
typedef struct {
  float *dw;
  const float *dy, *x;
  int32_t x0, step, tap, in_w, out_w;
  int32_t rows, taps, x_row, c;
  int accumulate;
} gradient_t;

#if MO_LANES == 1
#define MO_TILE_PIXELS 4
#define MO_TILE_TAPS 3
#define MO_DENSE 99
#else
#define MO_TILE_PIXELS 8
#define MO_TILE_TAPS 7
#define MO_DENSE (MO_LANES > 8 ? 8 : MO_LANES)
#define MO_L MO_LANES
#define MO_V 4
#include "mo_depthwise.h"
#endif
#if MO_LANES == 16
#define MO_L 16
#define MO_V 1
#include "mo_depthwise.h"
#endif
#if MO_LANES >= 8
#define MO_L 8
#define MO_V 1
#include "mo_depthwise.h"
#endif
#if MO_LANES >= 4
#define MO_L 4
#define MO_V 1
#include "mo_depthwise.h"
#else
#define MO_L 1
#define MO_V 4
#include "mo_depthwise.h"
#endif
#define MO_L 1
#define MO_V 1
#include "mo_depthwise.h"

/* The channels from `channel` on of outputs p0 .. p1, which all have the taps j0 .. j1 */
static void stencil(const stencil_t *s, int32_t channel, int32_t p0, int32_t p1, int32_t j0,
                    int32_t j1) {
#if MO_LANES > 1
  if (channel + 4 * MO_LANES <= s->c)
    channel = MO_JOIN(MO_JOIN(stencil_, MO_LANES), x4)(s, channel, p0, p1, j0, j1);
#endif
#if MO_LANES == 16
  if (channel + 16 <= s->c) channel = stencil_16x1(s, channel, p0, p1, j0, j1);
#endif
#if MO_LANES >= 8
  if (channel + 8 <= s->c) channel = stencil_8x1(s, channel, p0, p1, j0, j1);
#endif
#if MO_LANES >= 4
  if (channel + 4 <= s->c) channel = stencil_4x1(s, channel, p0, p1, j0, j1);
#else
  if (channel + 4 <= s->c) channel = stencil_1x4(s, channel, p0, p1, j0, j1);
#endif
  if (channel < s->c) stencil_1x1(s, channel, p0, p1, j0, j1);
}

static void gradient(const gradient_t *s) {
  int32_t channel = 0;
#if MO_LANES == 16
  if (channel + 16 <= s->c) channel = gradient_16x1(s, channel);
#endif
#if MO_LANES >= 8
  if (channel + 8 <= s->c) channel = gradient_8x1(s, channel);
#endif
#if MO_LANES >= 4
  if (channel + 4 <= s->c) channel = gradient_4x1(s, channel);
#else
  if (channel + 4 <= s->c) channel = gradient_1x4(s, channel);
#endif
  if (channel < s->c) gradient_1x1(s, channel);
}

#if MO_LANES > 1
/* Whether a tile is made for these taps: their columns coincide with those of the next outputs. */
static int is_dense(const stencil_t *s, int32_t stride) {
  if (stride * mo_max(s->tap, -s->tap) != s->step) return 0;
  return stride == 1 ? s->taps >= 1 && s->taps <= 7 && s->taps != 6
                     : stride == 2 && (s->taps == 3 || s->taps == 5 || s->taps == 7);
}

/* The first outputs, in tiles of 8 and 4, of as many channels as MO_DENSE divides; returns how
   many outputs. */
static int32_t dense(const stencil_t *s) {
  const int32_t stride = s->step / mo_max(s->tap, -s->tap);
  int32_t first = 0;
  if (!is_dense(s, stride)) return 0;
  for (int32_t pixels = 8; pixels >= 4; pixels -= 4)
    for (; first + pixels <= s->count; first += pixels) {
      const int32_t origin = s->tap < 0 ? first + pixels - 1 : first;
      const mo_range_t columns = mo_taps_inside(s->x0 + origin * s->step, s->tap,
                                             (pixels - 1) * stride + s->taps, s->in_w);
      const int32_t t0 = columns.begin, t1 = columns.end;
      int32_t channel = 0;
#if MO_LANES == 16
      if (channel + 16 <= s->c) channel = dense_16x1(s, channel, stride, pixels, first, t0, t1);
#endif
#if MO_LANES >= 8
      if (channel + 8 <= s->c) dense_8x1(s, channel, stride, pixels, first, t0, t1);
#else
      if (channel + 4 <= s->c) dense_4x1(s, channel, stride, pixels, first, t0, t1);
#endif
    }
  return first;
}
#endif

static void stencil_row(const stencil_t *s) {
  const int32_t span = (s->taps - 1) * s->tap; /* from the first tap to the last */
  const mo_range_t whole = mo_outputs_inside(s->x0 + mo_min(span, 0), s->step,
                                             s->in_w - mo_max(span, -span), s->count);
#if MO_LANES > 1
  const int32_t done = dense(s), left = s->c % MO_DENSE;
#else
  const int32_t done = 0, left = 0;
#endif
  for (int32_t p = left > 0 ? 0 : done, end; p < s->count; p = end) {
    const mo_range_t taps = mo_taps_inside(s->x0 + p * s->step, s->tap, s->taps, s->in_w);
    end = p >= whole.begin && p + 4 <= whole.end ? whole.end - (whole.end - p) % 4 : p + 1;
    if (p < done) end = mo_min(end, done);
    stencil(s, p < done ? s->c - left : 0, p, end, taps.begin, taps.end);
  }
}

void mo_depthwise_forward(float *y, const float *x, const float *w, const float *b,
                          const mo_conv_t *g, float lo, float hi) {
  stencil_t s = {0};
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
    stencil_row(&s);
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
  stencil_t s = {0};
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
      stencil_row(&s);
    }
  }
}

void mo_depthwise_dw(float *dw, const float *dy, const float *x, const mo_conv_t *g, int32_t row0,
                     int32_t row1, int accumulate) {
  gradient_t s = {0};
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
      const int32_t left = g->k_w - kw;
      if (MO_LANES > 1 && left >= 5)
        s.taps = left >= 7 ? 7 : 5;
      else
        s.taps = mo_min(left, left == 4 ? 2 : 3);
      s.x0 = kw * s.tap - g->pad_l;
      s.dw = dw + ((kh - row0) * g->k_w + kw) * s.c;
      gradient(&s);
    }
  }
}
