/* Additions, products, copies, gathers. */
#include <string.h>

#include "mo_kernels.h"
#include "mo_tile.h"

#define VEC(L) MO_JOIN(mo_f, L)

void mo_add(float *y, const float *a, const float *b, int32_t n, float lo, float hi) {
  for (int32_t i = 0; i < n; i++) {
    const float sum = a[i] + b[i];
    const float v = sum < lo ? lo : sum;
    y[i] = v > hi ? hi : v;
  }
}

void mo_mul(float *y, const float *a, const float *b, int32_t pixels, int32_t c,
            int32_t b_pixels) {
  const int32_t rows = b_pixels == pixels ? 1 : pixels, n = b_pixels == pixels ? pixels * c : c;
#define BODY(L) MO_STORE(L, y + j, MO_LOAD(L, a + j) * MO_LOAD(L, b + j));
  for (int32_t r = 0; r < rows; r++, y += n, a += n) {
    int32_t j = 0;
    MO_EACH(j, n, BODY)
  }
#undef BODY
}

void mo_mul_dgate(float *db, const float *dy, const float *a, int32_t pixels, int32_t c) {
  int32_t j = 0;
#define BODY(L)                                                                                \
  {                                                                                            \
    VEC(L) sum = {0};                                                                          \
    for (int32_t i = j; i < pixels * c; i += c) sum += MO_LOAD(L, dy + i) * MO_LOAD(L, a + i); \
    MO_STORE(L, db + j, sum);                                                                  \
  }
  MO_EACH(j, c, BODY)
#undef BODY
}

void mo_copy_blocks(float *dst, int32_t dst_stride, const float *src, int32_t src_stride,
                    int32_t blocks, int32_t len, int accumulate) {
  for (int32_t i = 0; i < blocks; i++, dst += dst_stride, src += src_stride) {
    if (accumulate)
      for (int32_t j = 0; j < len; j++) dst[j] += src[j];
    else
      memcpy(dst, src, (size_t)len * sizeof(float));
  }
}

void mo_gather(float *dst, const float *src, const uint16_t *idx, int32_t rows, int32_t c,
               int32_t n) {
  for (int32_t r = 0; r < rows; r++, dst += n, src += c)
    for (int32_t j = 0; j < n; j++) dst[j] = src[idx[j]];
}

void mo_transpose(float *dst, const float *src, int32_t rows, int32_t cols) {
  for (int32_t j = 0; j < cols; j++)
    for (int32_t r = 0; r < rows; r++) *dst++ = src[r * cols + j];
}

void mo_assemble(float *full, const float *base, const float *slice, const uint16_t *out_idx,
                 int32_t n_out, const uint16_t *in_idx, int32_t n_in, int32_t rows, int32_t taps,
                 int32_t cols) {
  if (full != base) memcpy(full, base, (size_t)(rows * taps * cols) * sizeof(float));
  for (int32_t a = 0; a < n_out; a++)
    for (int32_t t = 0; t < taps; t++, slice += n_in) {
      float *row = full + ((out_idx ? out_idx[a] : a) * taps + t) * cols;
      for (int32_t i = 0; i < n_in; i++) row[in_idx ? in_idx[i] : i] = slice[i];
    }
}
