/* Convolutions of any kernel, stride, padding, dilation and groups, as products of strided
   matrices: with y, dy of O columns and x, dx of K columns, one row per pixel,

       forward   y[p][o]  = b[o] + sum over k of x[p][k] w[o][k]
       dx        dx[p][k] = sum over o of dy[p][o] w[o][k]
       dw        dw[o][k] = sum over p of dy[p][o] x[p][k]

   A 1x1 convolution is one such product over all pixels; another is a product for each row of
   pixels and kernel tap, or kernel row where its taps lie side by side in memory.  Every element
   is summed in the order that mo_kernels.h states, whatever the tiles: where a sum is cut, its
   first part waits in the output. */
#include <string.h>

#include "mo_kernels.h"
#include "mo_tile.h"

typedef enum { MO_FROM_ZERO, MO_FROM_BIAS, MO_FROM_C } mo_start_t;

/* c[m][n] = start + sum over run < runs, r < depth of a[run][m][r] b[run][r][n]; depth may be 0.
   cm is the distance from c[m] to c[m + 1], and so on; a stride that a product fixes is unused. */
typedef struct {
  float *c;
  const float *a, *b, *bias;
  int32_t m, n, depth, runs;
  int32_t cm, cn, am, ar, a_run, br, bn, b_run;
  mo_start_t start;
  int clamp;
  float lo, hi;
} mo_gemm_t;

/* MO_ROWS(TILE) covers the rows of g with tiles of MO_TILE_ROWS and smaller. */
#if MO_LANES == 1
#define MO_TILE_ROWS 4
#define MO_ROWS(TILE)                          \
  int32_t m = 0;                               \
  MO_LOOP for (; m + 4 <= g->m; m += 4) TILE(4);       \
  for (; m < g->m; m++) TILE(1);
#else
#define MO_TILE_ROWS 8
#define MO_ROWS(TILE)                          \
  int32_t m = 0;                               \
  MO_LOOP for (; m + 8 <= g->m; m += 8) TILE(8);       \
  if (m + 4 <= g->m) {                         \
    TILE(4);                                   \
    m += 4;                                    \
  }                                            \
  if (m + 3 == g->m) TILE(3);                  \
  if (m + 2 == g->m) TILE(2);                  \
  if (m + 1 == g->m) TILE(1);
#endif

#if MO_LANES == 16
#define MO_L 16
#define MO_V 2
#include "mo_gemm.h"
#define MO_L 16
#define MO_V 1
#include "mo_gemm.h"
#endif
#if MO_LANES == 8
#define MO_L 8
#define MO_V 2
#include "mo_gemm.h"
#endif
#if MO_LANES >= 8
#define MO_L 8
#define MO_V 1
#include "mo_gemm.h"
#endif
#if MO_LANES == 4
#define MO_L 4
#define MO_V 2
#include "mo_gemm.h"
#endif
#if MO_LANES >= 4
#define MO_L 4
#define MO_V 1
#include "mo_gemm.h"
#endif
#if MO_LANES == 1
#define MO_L 1
#define MO_V 4
#include "mo_gemm.h"
#endif
#define MO_L 1
#define MO_V 1
#include "mo_gemm.h"

/* MO_DEPTH: how much of a sum is packed at a time; a panel takes 4 * MO_DEPTH * MO_WIDEST bytes of
   stack, none with one lane. */
#if MO_LANES == 1
#define MO_WIDEST 4
#define MO_DEPTH INT32_MAX
#else
#define MO_WIDEST (2 * MO_LANES)
#define MO_DEPTH (8 * MO_LANES)
#endif

/* The widest panel that fits into `columns`. */
static int32_t panel_width(int32_t columns) {
  int32_t width = MO_WIDEST;
  while (width > columns) width = width > 4 ? width / 2 : 1;
  return width;
}

/* MO_PANEL(kernel, width, ...) calls the kernel for panels of that width. */
#if MO_LANES == 16
#define MO_PANEL(kernel, width, ...) \
  switch (width) {                                     \
    case 32: MO_JOIN(kernel, 16x2)(__VA_ARGS__); break;      \
    case 16: MO_JOIN(kernel, 16x1)(__VA_ARGS__); break;      \
    case 8: MO_JOIN(kernel, 8x1)(__VA_ARGS__); break;        \
    case 4: MO_JOIN(kernel, 4x1)(__VA_ARGS__); break;        \
    default: MO_JOIN(kernel, 1x1)(__VA_ARGS__); break;       \
  }
#elif MO_LANES == 8
#define MO_PANEL(kernel, width, ...) \
  switch (width) {                                     \
    case 16: MO_JOIN(kernel, 8x2)(__VA_ARGS__); break;       \
    case 8: MO_JOIN(kernel, 8x1)(__VA_ARGS__); break;        \
    case 4: MO_JOIN(kernel, 4x1)(__VA_ARGS__); break;        \
    default: MO_JOIN(kernel, 1x1)(__VA_ARGS__); break;       \
  }
#elif MO_LANES == 4
#define MO_PANEL(kernel, width, ...) \
  switch (width) {                                     \
    case 8: MO_JOIN(kernel, 4x2)(__VA_ARGS__); break;        \
    case 4: MO_JOIN(kernel, 4x1)(__VA_ARGS__); break;        \
    default: MO_JOIN(kernel, 1x1)(__VA_ARGS__); break;       \
  }
#else
#define MO_PANEL(kernel, width, ...) \
  switch (width) {                                     \
    case 4: MO_JOIN(kernel, 1x4)(__VA_ARGS__); break;        \
    default: MO_JOIN(kernel, 1x1)(__VA_ARGS__); break;       \
  }
#endif

/* A 1x1 convolution without stride or padding sees one long row of pixels. */
static mo_conv_t flattened(const mo_conv_t *geometry) {
  mo_conv_t g = *geometry;
  if (g.k_h == 1 && g.k_w == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_t == 0 &&
      g.pad_l == 0 && g.in_h == g.out_h && g.in_w == g.out_w) {
    g.in_w *= g.in_h;
    g.out_w = g.in_w;
    g.in_h = g.out_h = 1;
  }
  return g;
}

/* A part of the sums of one panel: `rows` kernel rows from kh and `taps` taps of each from kw,
   whose products with the channels are numbered 0 .. taps * channels; of these, k0 .. k1. */
typedef struct {
  int32_t kh, rows, kw, taps, k0, k1;
} part_t;

/* Adds one part to the panel of output row oy.  p holds what all rows share. */
static void forward_row(mo_gemm_t *p, const part_t *part, float *y, const float *x, const float *w,
                        const mo_conv_t *g, int32_t oy, int32_t width) {
  const int32_t channels = g->in_c / g->groups;
  const int32_t iy = oy * g->stride_h - g->pad_t + part->kh * g->dil_h;
  const int32_t offset = part->kw * g->dil_w - g->pad_l;
  const mo_range_t rows = mo_taps_inside(iy, g->dil_h, part->rows, g->in_h);
  const mo_range_t whole =
      mo_outputs_inside(offset, g->stride_w, g->in_w - (part->taps - 1), g->out_w);
  int32_t end;
  for (int32_t ox = 0; ox < g->out_w; ox = end) {
    const int32_t ix = ox * g->stride_w + offset;
    const int32_t k0 = mo_max(part->k0, mo_max(0, -ix) * channels);
    const int32_t k1 = mo_min(part->k1, mo_min(part->taps, g->in_w - ix) * channels);
    end = ox == whole.begin ? mo_max(whole.end, ox + 1) : ox + 1;
    p->c = y + (oy * g->out_w + ox) * g->out_c;
    p->m = end - ox;
    p->depth = rows.begin < rows.end ? mo_max(k1 - k0, 0) : 0;
    if (p->depth > 0) {
      p->runs = rows.end - rows.begin;
      p->a = x + ((iy + rows.begin * g->dil_h) * g->in_w + ix) * g->in_c + k0;
      p->b = w + rows.begin * p->b_run + (k0 - part->k0) * p->br;
    } else if (p->start == MO_FROM_C && !p->clamp) {
      continue;
    }
#if MO_LANES == 1
    MO_PANEL(dot_, width, p, 0)
#else
    MO_PANEL(product_, width, p, 0)
#endif
  }
}

void mo_conv2d_forward(float *y, const float *x, const float *w, const float *b,
                       const mo_conv_t *geometry, float lo, float hi) {
  const mo_conv_t g = flattened(geometry);
  const int32_t channels = g.in_c / g.groups, out_channels = g.out_c / g.groups;
  const int32_t w_row = g.k_w * channels, w_stride = g.k_h * w_row;
  const int whole_rows = g.groups == 1 && g.dil_w == 1;
  const int32_t rows = whole_rows ? mo_max(1, MO_DEPTH / w_row) : 1;
  const int clamped = lo > MO_NO_LO || hi < MO_NO_HI;
  part_t part = {0};
  mo_gemm_t p = {0};
  part.taps = whole_rows ? g.k_w : 1;
  p.cm = g.out_c;
  p.am = g.stride_w * g.in_c;
  p.a_run = g.dil_h * g.in_w * g.in_c;
  p.lo = lo;
  p.hi = hi;
  for (int32_t o = 0, width; o < g.out_c; o += width) {
    const int32_t group = o / out_channels;
    width = panel_width((group + 1) * out_channels - o);
    p.start = b ? MO_FROM_BIAS : MO_FROM_ZERO;
    p.bias = b ? b + o : NULL;
    for (part.kh = 0; part.kh < g.k_h; part.kh += part.rows)
      for (part.kw = 0; part.kw < g.k_w; part.kw += part.taps)
        for (part.k0 = 0; part.k0 < part.taps * channels; part.k0 = part.k1) {
          const float *columns = w + o * w_stride + part.kh * w_row + part.kw * channels + part.k0;
          part.rows = mo_min(rows, g.k_h - part.kh);
          part.k1 = mo_min(part.k0 + MO_DEPTH, part.taps * channels);
#if MO_LANES == 1
          p.br = 1;
          p.bn = w_stride;
          p.b_run = w_row;
#else
          float panel[MO_DEPTH * MO_WIDEST];
          const int32_t depth = (part.rows - 1) * w_row + part.k1 - part.k0;
          MO_PANEL(pack_, width, panel, columns, w_stride, depth)
          columns = panel;
          p.br = width;
          p.b_run = w_row * width;
#endif
          p.clamp = clamped && part.kh + part.rows == g.k_h && part.kw + part.taps == g.k_w &&
                    part.k1 == part.taps * channels;
          for (int32_t oy = 0; oy < g.out_h; oy++)
            forward_row(&p, &part, y + o, x + group * channels, columns, &g, oy, width);
          p.start = MO_FROM_C;
        }
  }
}

void mo_conv2d_dx(float *dx, const float *dy, const float *w, const mo_conv_t *geometry,
                  int accumulate) {
  const mo_conv_t g = flattened(geometry);
  const int32_t channels = g.in_c / g.groups, out_channels = g.out_c / g.groups;
  const int32_t taps = g.k_h * g.k_w, row = g.in_w * g.in_c;
  const int covered = taps == 1 && g.out_h == g.in_h && g.out_w == g.in_w;
  mo_gemm_t p = {0};
  p.cm = g.stride_w * g.in_c;
  p.am = g.out_c;
  p.br = taps * channels;
  p.depth = out_channels;
  p.runs = 1;
  p.start = covered && !accumulate ? MO_FROM_ZERO : MO_FROM_C;
  for (int32_t iy = 0; iy < g.in_h; iy++, dx += row) {
    if (!accumulate && !covered) memset(dx, 0, (size_t)row * sizeof(float));
    for (int32_t tap = 0; tap < taps; tap++) {
      const int32_t reach = iy + g.pad_t - tap / g.k_w * g.dil_h, oy = reach / g.stride_h;
      const int32_t offset = tap % g.k_w * g.dil_w - g.pad_l;
      const mo_range_t seen = mo_outputs_inside(offset, g.stride_w, g.in_w, g.out_w);
      if (reach < 0 || reach % g.stride_h != 0 || oy >= g.out_h) continue;
      p.m = seen.end - seen.begin;
      for (int32_t group = 0; group < g.groups; group++) {
        p.c = dx + (seen.begin * g.stride_w + offset) * g.in_c + group * channels;
        p.a = dy + (oy * g.out_w + seen.begin) * g.out_c + group * out_channels;
        p.b = w + (group * out_channels * taps + tap) * channels;
        for (int32_t k = 0, width; k < channels; k += width) {
          width = panel_width(channels - k);
          MO_PANEL(product_, width, &p, k)
        }
      }
    }
  }
}

/* Vector operations that cover n columns of one row. */
static int32_t operations(int32_t n) {
  return n / MO_LANES + (n % MO_LANES) / 4 + n % 4;
}

/* One pixel: dw[o][k] = dy[o] x[k], which is all moving of memory */
static void outer_product(float *dw, const float *dy, const float *x, int32_t rows, int32_t columns,
                          int accumulate) {
  for (int32_t o = 0; o < rows; o++, dw += columns) {
    const float d = dy[o];
    if (accumulate)
      MO_LOOP for (int32_t k = 0; k < columns; k++) dw[k] += d * x[k];
    else
      MO_LOOP for (int32_t k = 0; k < columns; k++) dw[k] = 0.0f + d * x[k];
  }
}

void mo_conv2d_dw(float *dw, const float *dy, const float *x, const mo_conv_t *geometry,
                  int32_t row0, int32_t row1, int accumulate) {
  const mo_conv_t g = flattened(geometry);
  const int32_t channels = g.in_c / g.groups, out_channels = g.out_c / g.groups;
  const int32_t taps = g.k_h * g.k_w, pixels = g.out_h * g.out_w;
  mo_gemm_t p = {0};
  if (g.groups == 1 && pixels == 1 && taps == 1) {
    outer_product(dw, dy + row0, x, row1 - row0, channels, accumulate);
    return;
  }
  p.start = accumulate ? MO_FROM_C : MO_FROM_ZERO;
  for (int32_t o = row0, rows; o < row1; o += rows) {
    const int32_t group = o / out_channels;
    rows = mo_min(row1, (group + 1) * out_channels) - o;
    /* Lanes lie along the input channels, unless the output channels fill them better, even
       with the results scattered over dw. */
    const int swap = operations(channels) * rows * pixels >
                     (operations(rows) * pixels + 2 * rows) * channels;
    for (int32_t tap = 0; tap < taps; tap++) {
      const int32_t offset_h = tap / g.k_w * g.dil_h - g.pad_t;
      const int32_t offset_w = tap % g.k_w * g.dil_w - g.pad_l;
      const mo_range_t seen_h = mo_outputs_inside(offset_h, g.stride_h, g.in_h, g.out_h);
      const mo_range_t seen_w = mo_outputs_inside(offset_w, g.stride_w, g.in_w, g.out_w);
      const float *dy0 = dy + o, *x0 = x + group * channels;
      p.runs = seen_h.end - seen_h.begin;
      p.depth = p.runs > 0 ? seen_w.end - seen_w.begin : 0;
      if (p.depth > 0) {
        dy0 += (seen_h.begin * g.out_w + seen_w.begin) * g.out_c;
        x0 += ((seen_h.begin * g.stride_h + offset_h) * g.in_w +
               seen_w.begin * g.stride_w + offset_w) * g.in_c;
      }
      p.c = dw + ((o - row0) * taps + tap) * channels;
      p.a = swap ? x0 : dy0;
      p.b = swap ? dy0 : x0;
      p.m = swap ? channels : rows;
      p.n = swap ? rows : channels;
      p.cm = swap ? 1 : taps * channels;
      p.cn = swap ? taps * channels : 1;
      p.ar = swap ? g.stride_w * g.in_c : g.out_c;
      p.br = swap ? g.out_c : g.stride_w * g.in_c;
      p.a_run = swap ? g.stride_h * g.in_w * g.in_c : g.out_w * g.out_c;
      p.b_run = swap ? g.out_w * g.out_c : g.stride_h * g.in_w * g.in_c;
      for (int32_t n = 0, width; n < p.n; n += width) {
        width = panel_width(p.n - n);
        MO_PANEL(outer_, width, &p, n)
      }
    }
  }
}
