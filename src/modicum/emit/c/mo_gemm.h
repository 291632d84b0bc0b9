/* Products of strided matrices, by tiles that stay in registers:

       c[m][n] = start + sum over run < runs, r < depth of a[run][m][r] b[run][r][n]

   A tile is a few rows of one panel; a panel is one or two vectors of columns.  Each element is
   summed in the order of (run, r), and all tiles and lanes do is to choose which elements are
   summed side by side.  Where the sum is cut in parts, the first ones wait in c. */
#ifndef MO_GEMM_H
#define MO_GEMM_H

#include "mo_tile.h"

typedef enum { MO_FROM_ZERO, MO_FROM_BIAS, MO_FROM_C } mo_start_t;

/* cm is the distance from c[m] to c[m + 1], and so on; a stride that a kernel fixes at 1 is unused.
   runs >= 1, depth >= 0. */
typedef struct {
  float *c;
  const float *a, *b, *bias;
  int32_t m, depth, runs;
  int32_t cm, cn, am, ar, a_run, br, bn, b_run;
  mo_start_t start;
  int clamp; /* the finished sums, to [lo, hi] */
  float lo, hi;
} mo_gemm_t;

/* MO_PANELS(X): the panels, X(columns, lanes x vectors), widest first
   MO_DEPTH: how much of a sum mo_pack takes at a time; a panel is 4 * MO_DEPTH * MO_WIDEST bytes of
   stack, and with one lane none, as nothing is packed */
#if MO_LANES == 16
#define MO_PANELS(X) X(32, 16x2) X(16, 16x1) X(8, 8x1) X(4, 4x1) X(1, 1x1)
#define MO_WIDEST 32
#elif MO_LANES == 8
#define MO_PANELS(X) X(16, 8x2) X(8, 8x1) X(4, 4x1) X(1, 1x1)
#define MO_WIDEST 16
#elif MO_LANES == 4 && MO_REGISTERS > 8
#define MO_PANELS(X) X(8, 4x2) X(4, 4x1) X(1, 1x1)
#define MO_WIDEST 8
#elif MO_LANES == 4
#define MO_PANELS(X) X(4, 4x1) X(1, 1x1)
#define MO_WIDEST 4
#else
#define MO_PANELS(X) X(4, 1x4) X(1, 1x1)
#define MO_WIDEST 4
#endif
#define MO_DEPTH (MO_LANES == 1 ? INT32_MAX : 8 * MO_LANES)

/* MO_ROWS(TILE) covers the rows of g with tiles of MO_TILE_ROWS and fewer rows. */
#if MO_LANES == 1
#define MO_TILE_ROWS 4
#define MO_ROWS(TILE)                            \
  int32_t m = 0;                                 \
  MO_LOOP for (; m + 4 <= g->m; m += 4) TILE(4); \
  MO_LOOP for (; m < g->m; m++) TILE(1);
#else
#define MO_TILE_ROWS (MO_REGISTERS == 32 ? 8 : MO_REGISTERS == 16 ? 6 : 4)
#define MO_ROWS(TILE)                                                             \
  int32_t m = 0;                                                                  \
  MO_LOOP for (; m + MO_TILE_ROWS <= g->m; m += MO_TILE_ROWS) TILE(MO_TILE_ROWS); \
  if (MO_TILE_ROWS > 4 && m + 4 <= g->m) {                                        \
    TILE(4);                                                                      \
    m += 4;                                                                       \
  }                                                                               \
  if (m + 3 == g->m) TILE(3);                                                     \
  if (m + 2 == g->m) TILE(2);                                                     \
  if (m + 1 == g->m) TILE(1);
#endif

#if MO_LANES == 16
#define MO_L 16
#define MO_V 2
#include "mo_gemm_tile.h"
#define MO_L 16
#define MO_V 1
#include "mo_gemm_tile.h"
#endif
#if MO_LANES == 8
#define MO_L 8
#define MO_V 2
#include "mo_gemm_tile.h"
#endif
#if MO_LANES >= 8
#define MO_L 8
#define MO_V 1
#include "mo_gemm_tile.h"
#endif
#if MO_LANES == 4 && MO_REGISTERS > 8
#define MO_L 4
#define MO_V 2
#include "mo_gemm_tile.h"
#endif
#if MO_LANES >= 4
#define MO_L 4
#define MO_V 1
#include "mo_gemm_tile.h"
#else
#define MO_L 1
#define MO_V 4
#include "mo_gemm_tile.h"
#endif
#define MO_L 1
#define MO_V 1
#include "mo_gemm_tile.h"

/* The widest panel that fits into `columns` */
static int32_t mo_panel_width(int32_t columns) {
  int32_t width = MO_WIDEST;
  while (width > columns) width = width > 4 ? width / 2 : 1;
  return width;
}

/* The panel of `width` columns from n0, all rows.  Contiguous: a in r; b, c in n */
static void mo_product(const mo_gemm_t *g, int32_t n0, int32_t width) {
  switch (width) {
#define CASE(columns, shape)    \
  case columns:                 \
    product_##shape(g, n0);     \
    break;
    MO_PANELS(CASE)
#undef CASE
  }
}

/* Contiguous: a in m; b in n; with one lane also c in n */
static void mo_outer(const mo_gemm_t *g, int32_t n0, int32_t width) {
  switch (width) {
#define CASE(columns, shape)  \
  case columns:               \
    outer_##shape(g, n0);     \
    break;
    MO_PANELS(CASE)
#undef CASE
  }
}

#if MO_LANES == 1
/* Contiguous: a, b in r; c in n */
static void mo_dot(const mo_gemm_t *g, int32_t n0, int32_t width) {
  switch (width) {
#define CASE(columns, shape) \
  case columns:              \
    dot_##shape(g, n0);      \
    break;
    MO_PANELS(CASE)
#undef CASE
  }
}
#else
/* panel[r][n] = b[n * stride + r] for `width` columns */
static void mo_pack(float *panel, const float *b, int32_t stride, int32_t depth, int32_t width) {
  switch (width) {
#define CASE(columns, shape)               \
  case columns:                            \
    pack_##shape(panel, b, stride, depth); \
    break;
    MO_PANELS(CASE)
#undef CASE
  }
}
#endif

#endif
