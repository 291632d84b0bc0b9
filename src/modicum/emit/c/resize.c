/* Nearest and bilinear resizing of [h][w][c], with the source positions of PyTorch: float
   arithmetic, and exact copies where a size does not change. */
#include "mo_kernels.h"
#include "mo_tile.h"

/* PyTorch takes i and i / 2 for the plain sizes, whatever the scale */
static int32_t nearest(int32_t i, int32_t in, int32_t out, float scale) {
  if (out == in) return i;
  if (out == 2 * in) return i / 2;
  return mo_min((int32_t)((float)i * scale), in - 1);
}

void mo_resize_nearest_forward(float *y, const float *x, int32_t in_h, int32_t in_w,
                               int32_t out_h, int32_t out_w, int32_t c, float scale_h,
                               float scale_w) {
#define BODY(L) MO_STORE(L, y + j, MO_LOAD(L, in + j));
  for (int32_t oy = 0; oy < out_h; oy++) {
    const float *row = x + nearest(oy, in_h, out_h, scale_h) * in_w * c;
    for (int32_t ox = 0; ox < out_w; ox++, y += c) {
      const float *in = row + nearest(ox, in_w, out_w, scale_w) * c;
      int32_t j = 0;
      MO_EACH(j, c, BODY)
    }
  }
#undef BODY
}

void mo_resize_nearest_backward(float *dx, const float *dy, int32_t in_h, int32_t in_w,
                                int32_t out_h, int32_t out_w, int32_t c, float scale_h,
                                float scale_w) {
  for (int32_t i = 0; i < in_h * in_w * c; i++) dx[i] = 0.0f;
#define BODY(L) MO_STORE(L, out + j, MO_LOAD(L, out + j) + MO_LOAD(L, dy + j));
  for (int32_t oy = 0; oy < out_h; oy++) {
    float *row = dx + nearest(oy, in_h, out_h, scale_h) * in_w * c;
    for (int32_t ox = 0; ox < out_w; ox++, dy += c) {
      float *out = row + nearest(ox, in_w, out_w, scale_w) * c;
      int32_t j = 0;
      MO_EACH(j, c, BODY)
    }
  }
#undef BODY
}

/* An output lies between two inputs, `step` apart, which is 0 behind the last */
typedef struct {
  int32_t first, step;
  float w0, w1;
} between_t;

static between_t between(int32_t i, int32_t in, int32_t out, float scale, int align_corners) {
  between_t t = {i, 0, 1.0f, 0.0f};
  if (out == in) return t;
  const float at = align_corners ? scale * (float)i : scale * ((float)i + 0.5f) - 0.5f;
  const float inside = at < 0.0f ? 0.0f : at;
  t.first = mo_min((int32_t)inside, in - 1);
  t.step = t.first < in - 1;
  t.w1 = inside - (float)t.first;
  if (t.w1 > 1.0f) t.w1 = 1.0f;
  t.w0 = 1.0f - t.w1;
  return t;
}

void mo_resize_bilinear_forward(float *y, const float *x, int32_t in_h, int32_t in_w,
                                int32_t out_h, int32_t out_w, int32_t c, float scale_h,
                                float scale_w, int align_corners) {
#define BODY(L)                                                                          \
  MO_STORE(L, y + j,                                                                     \
           v.w0 * (h.w0 * MO_LOAD(L, top + j) + h.w1 * MO_LOAD(L, top + right + j)) +    \
               v.w1 * (h.w0 * MO_LOAD(L, low + j) + h.w1 * MO_LOAD(L, low + right + j)));
  for (int32_t oy = 0; oy < out_h; oy++) {
    const between_t v = between(oy, in_h, out_h, scale_h, align_corners);
    for (int32_t ox = 0; ox < out_w; ox++, y += c) {
      const between_t h = between(ox, in_w, out_w, scale_w, align_corners);
      const float *top = x + (v.first * in_w + h.first) * c, *low = top + v.step * in_w * c;
      const int32_t right = h.step * c;
      int32_t j = 0;
      MO_EACH_LONG(j, c, BODY)
    }
  }
#undef BODY
}

void mo_resize_bilinear_backward(float *dx, const float *dy, int32_t in_h, int32_t in_w,
                                 int32_t out_h, int32_t out_w, int32_t c, float scale_h,
                                 float scale_w, int align_corners) {
  for (int32_t i = 0; i < in_h * in_w * c; i++) dx[i] = 0.0f;
  /* one after the other: without a step two of them are the same */
#define ADD(L, out, weight) \
  MO_STORE(L, (out) + j, MO_LOAD(L, (out) + j) + (weight) * MO_LOAD(L, dy + j));
#define BODY(L)                                                                          \
  {                                                                                      \
    ADD(L, top, v.w0 * h.w0)                                                             \
    ADD(L, top + right, v.w0 * h.w1)                                                     \
    ADD(L, low, v.w1 * h.w0)                                                             \
    ADD(L, low + right, v.w1 * h.w1)                                                     \
  }
  for (int32_t oy = 0; oy < out_h; oy++) {
    const between_t v = between(oy, in_h, out_h, scale_h, align_corners);
    for (int32_t ox = 0; ox < out_w; ox++, dy += c) {
      const between_t h = between(ox, in_w, out_w, scale_w, align_corners);
      float *top = dx + (v.first * in_w + h.first) * c, *low = top + v.step * in_w * c;
      const int32_t right = h.step * c;
      int32_t j = 0;
      MO_EACH_LONG(j, c, BODY)
    }
  }
#undef BODY
#undef ADD
}
