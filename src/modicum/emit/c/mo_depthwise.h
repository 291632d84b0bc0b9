/* The two loops that all of depthwise.c comes down to, by tiles that stay in registers, with lanes
   along the channels. */
#ifndef MO_DEPTHWISE_H
#define MO_DEPTHWISE_H

#include <stddef.h>

#include "mo_tile.h"

/* A row of outputs from several rows of inputs (forward, dX):
   out[p] = start + sum over rows i and taps j of in[i][x0 + p * step + j * tap] w[i][j] */
typedef struct {
  float *out;
  const float *in, *w;          /* column 0 of the first row of in, tap 0 of that of w */
  const float *bias;            /* start; NULL: 0, or out with accumulate */
  int32_t count, out_step;      /* outputs, and floats from one to the next */
  int32_t x0, step, tap, in_w;  /* in columns; those outside [0, in_w) are left out */
  int32_t rows, taps;           /* either may be 0 */
  int32_t in_row, w_row, w_tap; /* in floats; in_row may be negative, as tap */
  int32_t c;
  int accumulate, clamp;
  float lo, hi;
} mo_stencil_t;

/* Neighbouring taps of one kernel row of dw:
   dw[t] = start + sum over rows and outputs p of dy[row][p] x[row][x0 + p * step + t * tap] */
typedef struct {
  float *dw;
  const float *dy, *x;
  int32_t x0, step, tap, in_w, out_w; /* in columns, as above */
  int32_t rows, taps;
  int32_t x_row, c; /* in floats */
  int accumulate;
} mo_taps_t;

/* The panels, X(channels, lanes x vectors), widest first: MO_CHANNELS for all; MO_WIDE before them
   for outputs taken one by one; MO_DENSE_CHANNELS for outputs whose taps share columns, of which
   MO_DENSE is the narrowest */
#if MO_LANES == 16
#define MO_CHANNELS(X) X(16, 16x1) X(8, 8x1) X(4, 4x1) X(1, 1x1)
#define MO_WIDE(X) X(64, 16x4)
#define MO_DENSE_CHANNELS(X) X(16, 16x1) X(8, 8x1)
#define MO_DENSE 8
#elif MO_LANES == 8
#define MO_CHANNELS(X) X(8, 8x1) X(4, 4x1) X(1, 1x1)
#define MO_WIDE(X) X(32, 8x4)
#define MO_DENSE_CHANNELS(X) X(8, 8x1)
#define MO_DENSE 8
#elif MO_LANES == 4
#define MO_CHANNELS(X) X(4, 4x1) X(1, 1x1)
#define MO_WIDE(X) X(16, 4x4)
#define MO_DENSE_CHANNELS(X) X(4, 4x1)
#define MO_DENSE 4
#else
#define MO_CHANNELS(X) X(4, 1x4) X(1, 1x1)
#define MO_WIDE(X)
#define MO_DENSE 1
#endif
#define MO_TILE_PIXELS (MO_LANES > 1 && MO_REGISTERS > 8 ? 8 : 4)
#define MO_TILE_TAPS (MO_LANES > 1 ? 7 : 3)

#if MO_LANES > 1
#define MO_L MO_LANES
#define MO_V 4
#include "mo_depthwise_tile.h"
#endif
#if MO_LANES == 16
#define MO_L 16
#define MO_V 1
#include "mo_depthwise_tile.h"
#endif
#if MO_LANES >= 8
#define MO_L 8
#define MO_V 1
#include "mo_depthwise_tile.h"
#endif
#if MO_LANES >= 4
#define MO_L 4
#define MO_V 1
#include "mo_depthwise_tile.h"
#else
#define MO_L 1
#define MO_V 4
#include "mo_depthwise_tile.h"
#endif
#define MO_L 1
#define MO_V 1
#include "mo_depthwise_tile.h"

/* The channels from `channel` on of outputs p0 .. p1, which all have the taps j0 .. j1 */
static void mo_stencil_part(const mo_stencil_t *s, int32_t channel, int32_t p0, int32_t p1,
                            int32_t j0, int32_t j1) {
#define PANEL(channels, shape) \
  if (channel + channels <= s->c) channel = stencil_##shape(s, channel, p0, p1, j0, j1);
  MO_WIDE(PANEL)
  MO_CHANNELS(PANEL)
#undef PANEL
}

#if MO_LANES > 1
/* Whether the columns of an output's taps coincide with those of the next outputs, and there is a
   tile for so many taps */
static int mo_is_dense(const mo_stencil_t *s, int32_t stride) {
  if (stride * mo_max(s->tap, -s->tap) != s->step) return 0;
  if (stride == 1) return s->taps >= 1 && s->taps <= 7 && s->taps != 6;
  return stride == 2 && (s->taps == 3 || s->taps == 5 || s->taps == 7);
}

/* The first outputs in tiles of 8 and 4, in the channels that MO_DENSE divides; returns how many
   outputs that were. */
static int32_t mo_stencil_dense(const mo_stencil_t *s) {
  const int32_t stride = s->step / mo_max(s->tap, -s->tap);
  int32_t first = 0;
  if (!mo_is_dense(s, stride)) return 0;
  for (int32_t pixels = MO_TILE_PIXELS; pixels >= 4; pixels -= 4)
    for (; first + pixels <= s->count; first += pixels) {
      const int32_t origin = s->tap < 0 ? first + pixels - 1 : first;
      const int32_t x = s->x0 + origin * s->step, columns = (pixels - 1) * stride + s->taps;
      const mo_range_t t = mo_taps_inside(x, s->tap, columns, s->in_w);
      int32_t channel = 0;
#define PANEL(channels, shape)    \
  if (channel + channels <= s->c) \
    channel = dense_##shape(s, channel, stride, pixels, first, t.begin, t.end);
      MO_DENSE_CHANNELS(PANEL)
#undef PANEL
    }
  return first;
}
#else
static int32_t mo_stencil_dense(const mo_stencil_t *s) {
  (void)s;
  return 0;
}
#endif

/* A row of outputs; those that lie inside with all their taps go in fours where they can. */
static void mo_stencil_row(const mo_stencil_t *s) {
  const int32_t dense = mo_stencil_dense(s), left = s->c % MO_DENSE;
  const int32_t span = (s->taps - 1) * s->tap; /* from the first tap to the last */
  const mo_range_t whole = mo_outputs_inside(s->x0 + mo_min(span, 0), s->step,
                                             s->in_w - mo_max(span, -span), s->count);
  for (int32_t p = left > 0 ? 0 : dense, end; p < s->count; p = end) {
    const mo_range_t taps = mo_taps_inside(s->x0 + p * s->step, s->tap, s->taps, s->in_w);
    end = p >= whole.begin && p + 4 <= whole.end ? whole.end - (whole.end - p) % 4 : p + 1;
    if (p < dense) end = mo_min(end, dense);
    mo_stencil_part(s, p < dense ? s->c - left : 0, p, end, taps.begin, taps.end);
  }
}

static void mo_taps(const mo_taps_t *s) {
  int32_t channel = 0;
#define PANEL(channels, shape) \
  if (channel + channels <= s->c) channel = gradient_##shape(s, channel);
  MO_CHANNELS(PANEL)
#undef PANEL
}

/* The most taps, of `left`, that there is a tile for */
static int32_t mo_tile_taps(int32_t left) {
  if (MO_TILE_TAPS == 7 && left >= 5) return left >= 7 ? 7 : 5;
  return mo_min(left, left == 4 ? 2 : 3);
}

#endif
