/* Template: register tiles of a matrix product.  mo_gemm.h includes it once for each pair of MO_L,
   the lanes of a vector, and MO_V, the vectors side by side; a panel is MO_V * MO_L columns. */
#define VEC MO_JOIN(mo_f, MO_L)
#define NAME(stem) MO_JOIN(MO_JOIN(stem, MO_L), MO_JOIN(x, MO_V))

/* One row of a panel, MO_V vectors; cn is the distance between columns. */
MO_INLINE void NAME(load_)(VEC *row, const float *c, const int32_t cn) {
  MO_UNROLL for (int v = 0; v < MO_V; v++) {
    float t[MO_L];
    if (cn != 1)
      MO_LOOP for (int n = 0; n < MO_L; n++) t[n] = c[(v * MO_L + n) * cn];
    row[v] = MO_LOAD(MO_L, cn == 1 ? c + v * MO_L : t);
  }
}

MO_INLINE void NAME(store_)(float *c, const VEC *row, const int32_t cn) {
  MO_UNROLL for (int v = 0; v < MO_V; v++) {
    float t[MO_L];
    MO_STORE(MO_L, cn == 1 ? c + v * MO_L : t, row[v]);
    if (cn != 1)
      MO_LOOP for (int n = 0; n < MO_L; n++) c[(v * MO_L + n) * cn] = t[n];
  }
}

/* Rows m0 .. m0 + M of the panel at column n0.  Where this is inlined, M and the strides that are 1
   are constants. */
MO_INLINE void NAME(tile_)(const int M, const mo_gemm_t *g, const int32_t m0, const int32_t n0,
                           const int32_t am, const int32_t ar, const int32_t br, const int32_t bn,
                           const int32_t cn) {
  VEC sum[MO_TILE_ROWS][MO_V];
  float *c = g->c + m0 * g->cm + n0 * cn;
  const int32_t cm = g->cm, depth = g->depth;
  const float *a = g->a + m0 * am, *b = g->b + n0 * bn;
  if (g->start == MO_FROM_C) {
    MO_UNROLL for (int m = 0; m < M; m++) NAME(load_)(sum[m], c + m * cm, cn);
  } else {
    VEC first[MO_V] = {0};
    if (g->start == MO_FROM_BIAS) NAME(load_)(first, g->bias + n0, 1);
    MO_UNROLL for (int m = 0; m < M; m++)
      MO_UNROLL for (int v = 0; v < MO_V; v++) sum[m][v] = first[v];
  }
  for (int32_t left = g->runs;; a += g->a_run, b += g->b_run) {
    MO_LOOP for (int32_t r = 0; r < depth; r++) {
      VEC w[MO_V];
      MO_UNROLL for (int v = 0; v < MO_V; v++)
        w[v] = MO_LOAD(MO_L, b + r * br + v * (MO_L == 1 ? bn : MO_L));
      MO_UNROLL for (int m = 0; m < M; m++) {
        const float x = a[m * am + r * ar];
        MO_UNROLL for (int v = 0; v < MO_V; v++) sum[m][v] += x * w[v];
      }
    }
    if (--left <= 0) break;
  }
  if (g->clamp)
    MO_UNROLL for (int m = 0; m < M; m++)
      MO_UNROLL for (int v = 0; v < MO_V; v++) MO_CLAMP(MO_L, sum[m][v], g->lo, g->hi);
  MO_UNROLL for (int m = 0; m < M; m++) NAME(store_)(c + m * cm, sum[m], cn);
}

/* All rows of a panel; a contiguous in the sum, b and c in the columns */
MO_NOINLINE void NAME(product_)(const mo_gemm_t *g, const int32_t n0) {
#define TILE(M) NAME(tile_)(M, g, m, n0, g->am, 1, g->br, 1, 1)
  MO_ROWS(TILE)
#undef TILE
}

/* The same with a contiguous in the rows; c is not contiguous where lanes ask for it */
MO_NOINLINE void NAME(outer_)(const mo_gemm_t *g, const int32_t n0) {
#define TILE(M) NAME(tile_)(M, g, m, n0, 1, g->ar, g->br, 1, MO_LANES > 1 ? g->cn : 1)
  MO_ROWS(TILE)
#undef TILE
}

#if MO_LANES == 1
/* The same with a and b contiguous in the sum, c in the columns */
MO_NOINLINE void NAME(dot_)(const mo_gemm_t *g, const int32_t n0) {
#define TILE(M) NAME(tile_)(M, g, m, n0, g->am, 1, 1, g->bn, 1)
  MO_ROWS(TILE)
#undef TILE
}
#endif

#if MO_LANES > 1
/* panel[k][n] = w[n * stride + k].  Blocks of MO_L x MO_L floats are transposed in registers: log2
   of MO_L times, every row i is zipped with row i + MO_L / 2. */
MO_NOINLINE void NAME(pack_)(float *panel, const float *w, const int32_t stride,
                             const int32_t depth) {
  for (int v = 0; v < MO_V; v++, panel += MO_L, w += MO_L * stride) {
    int32_t k = 0;
#if MO_L > 1 && MO_HAS_ZIP
    for (; k + MO_L <= depth; k += MO_L) {
      VEC t[MO_L], z[MO_L];
      MO_UNROLL for (int i = 0; i < MO_L; i++) t[i] = MO_LOAD(MO_L, w + i * stride + k);
      MO_UNROLL for (int step = 1; step < MO_L; step *= 2) {
        MO_UNROLL for (int i = 0; i < MO_L / 2; i++) {
          z[2 * i] = MO_JOIN(MO_ZIP_LO, MO_L)(t[i], t[i + MO_L / 2]);
          z[2 * i + 1] = MO_JOIN(MO_ZIP_HI, MO_L)(t[i], t[i + MO_L / 2]);
        }
        MO_UNROLL for (int i = 0; i < MO_L; i++) t[i] = z[i];
      }
      MO_UNROLL for (int i = 0; i < MO_L; i++)
        MO_STORE(MO_L, panel + (k + i) * MO_V * MO_L, t[i]);
    }
#endif
    for (; k < depth; k++)
      for (int i = 0; i < MO_L; i++) panel[k * MO_V * MO_L + i] = w[i * stride + k];
  }
}
#endif

#undef VEC
#undef NAME
#undef MO_L
#undef MO_V
