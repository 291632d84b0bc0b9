/* Convolutions of any kernel, stride, padding, dilation and groups, as products of strided
   matrices: with y, dy of O columns and x, dx of K columns, one row per pixel,

       forward   y[p][o]  = b[o] + sum over k of x[p][k] w[o][k]
       dx        dx[p][k] = sum over o of dy[p][o] w[o][k]
       dw        dw[o][k] = sum over p of dy[p][o] x[p][k]

   A 1x1 convolution is one such product over all pixels; another is a product for each row of
   pixels and kernel tap, or whole kernel rows where their taps lie side by side in memory. */
#include <string.h>

#include "mo_gemm.h"
#include "mo_kernels.h"

/* Every output pixel comes from the one input pixel in its place. */
static int pixel_by_pixel(const mo_conv_t *g) {
  return g->k_h == 1 && g->k_w == 1 && g->stride_h == 1 && g->stride_w == 1 && g->pad_t == 0 &&
         g->pad_l == 0 && g->in_h == g->out_h && g->in_w == g->out_w;
}

/* A 1x1 convolution without stride or padding sees one long row of pixels. */
static mo_conv_t flattened(const mo_conv_t *geometry) {
  mo_conv_t g = *geometry;
  if (pixel_by_pixel(geometry)) {
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
    mo_dot(p, 0, width);
#else
    mo_product(p, 0, width);
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
    width = mo_panel_width((group + 1) * out_channels - o);
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
          mo_pack(panel, columns, w_stride, depth, width);
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
  const int covered = pixel_by_pixel(geometry);
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
          width = mo_panel_width(channels - k);
          mo_product(&p, k, width);
        }
      }
    }
  }
}

/* One pixel: dw[o][k] = dy[o] x[k], which is all moving of memory */
static void outer_product(float *dw, const float *dy, const float *x, int32_t rows, int32_t columns,
                          int accumulate) {
  for (int32_t o = 0; o < rows; o++, dw += columns) {
    const float d = dy[o];
    int32_t k = 0;
#define ADD(L) MO_STORE(L, dw + k, MO_LOAD(L, dw + k) + d * MO_LOAD(L, x + k));
#define SET(L) MO_STORE(L, dw + k, d * MO_LOAD(L, x + k));
    if (accumulate) {
      MO_EACH(k, columns, ADD)
    } else {
      MO_EACH(k, columns, SET)
    }
#undef ADD
#undef SET
  }
}

/* One side of the sum over pixels: `count` values of each pixel, the distances from pixel to pixel
   and from row to row, and the distance in dw from one value's results to the next's. */
typedef struct {
  const float *first;
  int32_t count, pixel, row, result;
} side_t;

/* Vector operations for n columns side by side */
static int32_t operations(int32_t n) {
  return n / MO_LANES + (n % MO_LANES) / 4 + n % 4;
}

/* Lanes lie along the input channels, unless the output channels fill them better, even with the
   results scattered over dw. */
static int swapped(int32_t out, int32_t in, int32_t pixels) {
  return MO_LANES > 1 && operations(in) * out - operations(out) * in > 2 * out * in / pixels;
}

void mo_conv2d_dw(float *dw, const float *dy, const float *x, const mo_conv_t *geometry,
                  int32_t row0, int32_t row1, int accumulate) {
  const mo_conv_t g = flattened(geometry);
  const int32_t channels = g.in_c / g.groups, out_channels = g.out_c / g.groups;
  const int32_t taps = g.k_h * g.k_w, pixels = g.out_h * g.out_w;
  mo_gemm_t p = {0};
  if (g.groups == 1 && pixels == 1 && pixel_by_pixel(geometry)) {
    outer_product(dw, dy + row0, x, row1 - row0, channels, accumulate);
    return;
  }
  p.start = accumulate ? MO_FROM_C : MO_FROM_ZERO;
  for (int32_t o = row0, rows; o < row1; o += rows) {
    const int32_t group = o / out_channels;
    rows = mo_min(row1, (group + 1) * out_channels) - o;
    for (int32_t tap = 0; tap < taps; tap++) {
      const int32_t offset_h = tap / g.k_w * g.dil_h - g.pad_t;
      const int32_t offset_w = tap % g.k_w * g.dil_w - g.pad_l;
      const mo_range_t seen_h = mo_outputs_inside(offset_h, g.stride_h, g.in_h, g.out_h);
      const mo_range_t seen_w = mo_outputs_inside(offset_w, g.stride_w, g.in_w, g.out_w);
      side_t out = {dy + o, rows, g.out_c, g.out_w * g.out_c, taps * channels};
      side_t in = {x + group * channels, channels, g.stride_w * g.in_c,
                   g.stride_h * g.in_w * g.in_c, 1};
      const int swap = swapped(rows, channels, pixels);
      p.runs = seen_h.end - seen_h.begin;
      p.depth = p.runs > 0 ? seen_w.end - seen_w.begin : 0;
      if (p.depth > 0) {
        out.first += seen_h.begin * out.row + seen_w.begin * out.pixel;
        in.first += (seen_h.begin * g.stride_h + offset_h) * g.in_w * g.in_c +
                    (seen_w.begin * g.stride_w + offset_w) * g.in_c;
      }
      const side_t *m = swap ? &in : &out, *n = swap ? &out : &in;
      p.c = dw + ((o - row0) * taps + tap) * channels;
      p.m = m->count;
      p.cm = m->result;
      p.cn = n->result;
      p.a = m->first;
      p.ar = m->pixel;
      p.a_run = m->row;
      p.b = n->first;
      p.br = n->pixel;
      p.b_run = n->row;
      for (int32_t column = 0, width; column < n->count; column += width) {
        width = mo_panel_width(n->count - column);
        mo_outer(&p, column, width);
      }
    }
  }
}
