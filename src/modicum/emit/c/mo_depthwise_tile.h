/* Template: register tiles of depthwise convolutions.  mo_depthwise.h includes it once for each
   pair of MO_L, the lanes of a vector, and MO_V, the vectors side by side; a panel is MO_V * MO_L
   channels wide.  Every kernel takes as many panels as fit from `channel` on, and returns the first
   channel that is left. */
#define VEC MO_JOIN(mo_f, MO_L)
#define NAME(stem) MO_JOIN(MO_JOIN(stem, MO_L), MO_JOIN(x, MO_V))

/* P outputs from `first` on, from the taps j0 .. j1 of every row */
MO_INLINE void NAME(outputs_)(const int P, const mo_stencil_t *s, const int32_t channel,
                              const int32_t first, const int32_t j0, const int32_t j1) {
  VEC sum[MO_TILE_PIXELS][MO_V];
  const int32_t out_step = s->out_step, step = s->step * s->c, tap = s->tap * s->c;
  const int32_t in_row = s->in_row, w_row = s->w_row, w_tap = s->w_tap, rows = s->rows;
  const float *in = s->in + (s->x0 + first * s->step) * s->c + channel, *w = s->w + channel;
  float *out = s->out + first * out_step + channel;
  if (s->accumulate) {
    MO_UNROLL for (int p = 0; p < P; p++)
      MO_UNROLL for (int v = 0; v < MO_V; v++)
        sum[p][v] = MO_LOAD(MO_L, out + p * out_step + v * MO_L);
  } else {
    VEC start[MO_V] = {0};
    if (s->bias)
      MO_UNROLL for (int v = 0; v < MO_V; v++)
        start[v] = MO_LOAD(MO_L, s->bias + channel + v * MO_L);
    MO_UNROLL for (int p = 0; p < P; p++)
      MO_UNROLL for (int v = 0; v < MO_V; v++) sum[p][v] = start[v];
  }
  MO_LOOP for (int32_t i = 0; i < rows; i++, in += in_row, w += w_row)
    MO_LOOP for (int32_t j = j0; j < j1; j++)
      MO_UNROLL for (int v = 0; v < MO_V; v++) {
        const VEC weight = MO_LOAD(MO_L, w + j * w_tap + v * MO_L);
        MO_UNROLL for (int p = 0; p < P; p++)
          sum[p][v] += MO_LOAD(MO_L, in + j * tap + p * step + v * MO_L) * weight;
      }
  if (s->clamp)
    MO_UNROLL for (int p = 0; p < P; p++)
      MO_UNROLL for (int v = 0; v < MO_V; v++) MO_CLAMP(MO_L, sum[p][v], s->lo, s->hi);
  MO_UNROLL for (int p = 0; p < P; p++)
    MO_UNROLL for (int v = 0; v < MO_V; v++)
      MO_STORE(MO_L, out + p * out_step + v * MO_L, sum[p][v]);
}

/* Outputs p0 .. p1, which all have the taps j0 .. j1 */
MO_NOINLINE int32_t NAME(stencil_)(const mo_stencil_t *s, int32_t channel, const int32_t p0,
                                   const int32_t p1, const int32_t j0, const int32_t j1) {
  MO_LOOP for (; channel + MO_V * MO_L <= s->c; channel += MO_V * MO_L) {
    int32_t p = p0;
#if MO_LANES == 1 && MO_V == 4
    MO_LOOP for (; p + 4 <= p1; p += 4) NAME(outputs_)(4, s, channel, p, j0, j1);
#endif
    MO_LOOP for (; p < p1; p++) NAME(outputs_)(1, s, channel, p, j0, j1);
  }
  return channel;
}

#if MO_L > 1 && MO_L >= MO_DENSE && MO_V == 1
/* P outputs from `first` on whose K taps share columns: output p sees columns S * p .. S * p + K,
   of which t0 .. t1 exist, and each is loaded once for all outputs that see it.  Where the taps
   go backward so do the outputs here, and every sum still takes its taps in order. */
MO_INLINE void NAME(columns_)(const int K, const int S, const int P, const mo_stencil_t *s,
                              const int32_t channel, const int32_t first, const int32_t t0,
                              const int32_t t1) {
  VEC sum[MO_TILE_PIXELS];
  const ptrdiff_t column = s->tap * s->c, in_row = s->in_row, w_row = s->w_row, w_tap = s->w_tap;
  const ptrdiff_t out_step = s->tap < 0 ? -s->out_step : s->out_step;
  const int32_t origin = s->tap < 0 ? first + P - 1 : first, rows = s->rows;
  const float *in = s->in + (s->x0 + origin * s->step) * s->c + channel, *w = s->w + channel;
  float *out = s->out + origin * s->out_step + channel;
  if (s->accumulate) {
    MO_UNROLL for (int p = 0; p < P; p++) sum[p] = MO_LOAD(MO_L, out + p * out_step);
  } else {
    VEC start = {0};
    if (s->bias) start = MO_LOAD(MO_L, s->bias + channel);
    MO_UNROLL for (int p = 0; p < P; p++) sum[p] = start;
  }
  MO_LOOP for (int32_t i = 0; i < rows; i++, in += in_row, w += w_row) {
    VEC weight[MO_TILE_TAPS];
    MO_UNROLL for (int j = 0; j < K; j++) weight[j] = MO_LOAD(MO_L, w + j * w_tap);
    MO_UNROLL for (int t = 0; t < (P - 1) * S + K; t++)
      if (t >= t0 && t < t1) {
        const VEC x = MO_LOAD(MO_L, in + t * column);
        MO_UNROLL for (int j = 0; j < K; j++)
          if (t >= j && (t - j) % S == 0 && (t - j) / S < P) sum[(t - j) / S] += x * weight[j];
      }
  }
  if (s->clamp)
    MO_UNROLL for (int p = 0; p < P; p++) MO_CLAMP(MO_L, sum[p], s->lo, s->hi);
  MO_UNROLL for (int p = 0; p < P; p++) MO_STORE(MO_L, out + p * out_step, sum[p]);
}

/* The `pixels` outputs from `first` on, by the tile for their taps and stride */
MO_NOINLINE int32_t NAME(dense_)(const mo_stencil_t *s, int32_t channel, const int32_t stride,
                                 const int32_t pixels, const int32_t first, const int32_t t0,
                                 const int32_t t1) {
  const int32_t tile = s->taps * 100 + stride * 10 + pixels;
  MO_LOOP for (; channel + MO_L <= s->c; channel += MO_L) switch (tile) {
#define CASE(K, S, P)                                   \
  case K * 100 + S * 10 + P:                            \
    NAME(columns_)(K, S, P, s, channel, first, t0, t1); \
    break;
#if MO_TILE_PIXELS == 8
#define CASES(K, S) CASE(K, S, 8) CASE(K, S, 4)
#else
#define CASES(K, S) CASE(K, S, 4)
#endif
      CASES(1, 1)
      CASES(2, 1)
      CASES(3, 1)
      CASES(4, 1)
      CASES(5, 1)
      CASES(7, 1)
      CASES(3, 2)
      CASES(5, 2)
      CASES(7, 2)
#undef CASES
#undef CASE
    }
  return channel;
}
#endif

#if MO_L == 1 || MO_V == 1
/* T neighbouring taps of one kernel row of dw */
MO_INLINE void NAME(taps_)(const int T, const mo_taps_t *s, const int32_t channel) {
  VEC sum[MO_TILE_TAPS][MO_V];
  float *dw = s->dw + channel;
  const int32_t c = s->c, tap = s->tap * c;
  const mo_range_t whole =
      mo_outputs_inside(s->x0, s->step, s->in_w - (T - 1) * s->tap, s->out_w);
  MO_UNROLL for (int t = 0; t < T; t++)
    MO_UNROLL for (int v = 0; v < MO_V; v++) {
      sum[t][v] = (VEC){0};
      if (s->accumulate) sum[t][v] = MO_LOAD(MO_L, dw + t * c + v * MO_L);
    }
  MO_LOOP for (int32_t row = 0; row < s->rows; row++) {
    const float *dy = s->dy + row * s->out_w * c + channel;
    const float *x = s->x + row * s->x_row + channel;
    MO_LOOP for (int32_t p = 0; p < s->out_w; p++) {
      const int32_t ix = s->x0 + p * s->step;
      VEC d[MO_V];
      MO_UNROLL for (int v = 0; v < MO_V; v++) d[v] = MO_LOAD(MO_L, dy + p * c + v * MO_L);
      if (whole.begin <= p && p < whole.end) {
        MO_UNROLL for (int t = 0; t < T; t++)
          MO_UNROLL for (int v = 0; v < MO_V; v++)
            sum[t][v] += d[v] * MO_LOAD(MO_L, x + ix * c + t * tap + v * MO_L);
      } else {
        MO_UNROLL for (int t = 0; t < T; t++)
          if (ix + t * s->tap >= 0 && ix + t * s->tap < s->in_w)
            MO_UNROLL for (int v = 0; v < MO_V; v++)
              sum[t][v] += d[v] * MO_LOAD(MO_L, x + ix * c + t * tap + v * MO_L);
      }
    }
  }
  MO_UNROLL for (int t = 0; t < T; t++)
    MO_UNROLL for (int v = 0; v < MO_V; v++)
      MO_STORE(MO_L, dw + t * c + v * MO_L, sum[t][v]);
}

MO_NOINLINE int32_t NAME(gradient_)(const mo_taps_t *s, int32_t channel) {
  MO_LOOP for (; channel + MO_V * MO_L <= s->c; channel += MO_V * MO_L) switch (s->taps) {
#if MO_LANES > 1
      case 7: NAME(taps_)(7, s, channel); break;
      case 5: NAME(taps_)(5, s, channel); break;
#endif
      case 3: NAME(taps_)(3, s, channel); break;
      case 2: NAME(taps_)(2, s, channel); break;
      default: NAME(taps_)(1, s, channel); break;
    }
  return channel;
}

#endif

#undef VEC
#undef NAME
#undef MO_L
#undef MO_V
