/* modicum kernels: float32 forward / backward pairs in plain pointers.

   Layouts   activations [h][w][c] (one sample); convolution weights
             [out_c][k_h][k_w][in_c / groups]; depthwise weights [k_h][k_w][c].
   Order     every output element is one sequential sum in a fixed order.  y: bias, then kernel row,
             kernel column, input channel.  dx: kernel row, kernel column, output channel.
             dw, db, dgamma: pixels in raster order.  accumulate: the old value comes first.
             Taps on the padding are left out.  Tiles and vector lanes only choose which elements
             are computed side by side, so a build with -ffp-contract=off gives the same bits on
             every target.
   Clamp     lo < hi; pass MO_NO_LO / MO_NO_HI for no activation, 0 and 6 for relu6.  With lo =
             -0.0f what is negative becomes -0 and +0 stays: y keeps the sign of what was clamped.
   No kernel allocates, recurses or keeps state.  dx / dw / y never overlap their inputs
   unless a comment says "may be in place". */
#ifndef MO_KERNELS_H
#define MO_KERNELS_H

#include <math.h> /* INFINITY; no function of it is called */
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* infinities, and not the largest floats: an overflow passes through and stays visible */
#define MO_NO_LO (-INFINITY)
#define MO_NO_HI (INFINITY)

typedef struct {
  int32_t in_h, in_w, in_c;
  int32_t out_h, out_w, out_c;
  int32_t k_h, k_w, stride_h, stride_w;
  int32_t pad_t, pad_l, dil_h, dil_w, groups;
} mo_conv_t;

typedef struct {
  int32_t in_h, in_w, c;
  int32_t out_h, out_w;
  int32_t k_h, k_w, stride_h, stride_w;
  int32_t pad_t, pad_l, pad_b, pad_r, dil_h, dil_w;
} mo_pool_t;

/* ---- conv.c: any kernel, stride, padding, dilation, groups; a linear layer over P rows is the
        1x1 convolution of an image of 1 x P pixels ---- */
/* y = clamp(conv(x, w) + b); b may be NULL */
void mo_conv2d_forward(float *y, const float *x, const float *w, const float *b,
                       const mo_conv_t *g, float lo, float hi);
/* dx = conv^T(dy, w), or dx += with accumulate */
void mo_conv2d_dx(float *dx, const float *dy, const float *w, const mo_conv_t *g, int accumulate);
/* rows [row0, row1) of dw = sum over pixels of dy x; dw points at row row0; a row is
   k_h * k_w * in_c / groups floats.  dw += with accumulate */
void mo_conv2d_dw(float *dw, const float *dy, const float *x, const mo_conv_t *g, int32_t row0,
                  int32_t row1, int accumulate);

/* ---- depthwise.c: groups == in_c == out_c ---- */
void mo_depthwise_forward(float *y, const float *x, const float *w, const float *b,
                          const mo_conv_t *g, float lo, float hi);
void mo_depthwise_dx(float *dx, const float *dy, const float *w, const mo_conv_t *g,
                     int accumulate);
/* kernel rows [row0, row1) of dw; a row is k_w * c floats; dw points at row row0 */
void mo_depthwise_dw(float *dw, const float *dy, const float *x, const mo_conv_t *g, int32_t row0,
                     int32_t row1, int accumulate);

/* ---- affine.c: per-channel operations on [pixels][c] ---- */
/* db[c] = sum over pixels of dy */
void mo_bias_grad(float *db, const float *dy, int32_t pixels, int32_t c, int accumulate);
/* y = clamp((x - mean) * rstd * gamma + beta), batch norm with frozen statistics; evaluated as
   x * (gamma * rstd) + (beta - mean * gamma * rstd), scale and shift formed once per channel.
   May be in place. */
void mo_affine_forward(float *y, const float *x, const float *gamma, const float *beta,
                       const float *mean, const float *rstd, int32_t pixels, int32_t c, float lo,
                       float hi);
/* dx = dy * gamma * rstd; may be in place */
void mo_affine_dx(float *dx, const float *dy, const float *gamma, const float *rstd,
                  int32_t pixels, int32_t c);
/* dgamma[j] = sum over pixels of dy[j] * (x[j] - mean[j]) * rstd[j] */
void mo_affine_dgamma(float *dgamma, const float *dy, const float *x, const float *mean,
                      const float *rstd, int32_t pixels, int32_t c, int accumulate);

/* ---- activation.c ---- */
/* y = clamp(x); may be in place */
void mo_clamp_forward(float *y, const float *x, int32_t n, float lo, float hi);
/* bit i (LSB first) of mask = lo < y[i] && y[i] < hi; (n + 7) / 8 bytes, spare bits 0 */
void mo_mask_pack(uint8_t *mask, const float *y, int32_t n, float lo, float hi);
/* dx = mask ? dy : 0; may be in place */
void mo_mask_backward(float *dx, const float *dy, const uint8_t *mask, int32_t n);
/* the same from the kept output: dx = (lo < y && y < hi) ? dy : 0; may be in place on dy */
void mo_clamp_backward(float *dx, const float *dy, const float *y, int32_t n, float lo, float hi);
/* bit i of mask = the sign bit of y[i] is clear; packed as above */
void mo_sign_pack(uint8_t *mask, const float *y, int32_t n);
/* dx = the sign bit of y is clear ? dy : 0; may be in place on dy */
void mo_sign_backward(float *dx, const float *dy, const float *y, int32_t n);
/* y = x * clamp(x + 3, 0, 6) / 6; the sign bit of y is that of x, with -0 taken as +0.  May be in
   place. */
void mo_hardswish_forward(float *y, const float *x, int32_t n);
/* from the input; dx = 0 at -3 and dy at 3, as PyTorch.  May be in place on dy. */
void mo_hardswish_backward(float *dx, const float *dy, const float *x, int32_t n);
/* y = clamp(x + 3, 0, 6) / 6; may be in place */
void mo_hardsigmoid_forward(float *y, const float *x, int32_t n);
/* dx = mask ? dy / 6 : 0 with mo_mask_pack(mask, x, n, -3, 3) of the input; may be in place */
void mo_hardsigmoid_backward(float *dx, const float *dy, const uint8_t *mask, int32_t n);

/* ---- sigmoid.c ---- */
/* y = 1 / (1 + exp(-x)); may be in place */
void mo_sigmoid_forward(float *y, const float *x, int32_t n);
/* dx = dy * y * (1 - y); may be in place on dy */
void mo_sigmoid_backward(float *dx, const float *dy, const float *y, int32_t n);
/* y = x * sigmoid(x); the sign bit of y is that of x, with -0 taken as +0.  May be in place. */
void mo_silu_forward(float *y, const float *x, int32_t n);
/* from the input: dx = dy * s * (1 + x * (1 - s)), s = sigmoid(x); may be in place on dy */
void mo_silu_backward(float *dx, const float *dy, const float *x, int32_t n);

/* ---- norm.c: on [pixels][c]; the batch is the one sample ---- */
/* y = clamp((x - mean) * rstd * gamma + beta), rstd = 1 / sqrt(variance + eps).  With stats: mean
   and biased variance over the pixels, more than one; they are kept, c means and then c rstds.
   stats NULL: the running statistics.  May be in place. */
void mo_batch_norm_forward(float *y, const float *x, const float *gamma, const float *beta,
                           const float *running_mean, const float *running_var, float *stats,
                           int32_t pixels, int32_t c, float eps, float lo, float hi);
/* running = (1 - momentum) * running + momentum * new, with the unbiased variance; apart from the
   forward pass, so that a sample whose loss is not finite moves nothing */
void mo_batch_norm_follow(float *running_mean, float *running_var, const float *stats,
                          int32_t pixels, int32_t c, float eps, float momentum);
/* through the statistics; may be in place on dy.  dgamma: mo_affine_dgamma with mean = stats and
   rstd = stats + c. */
void mo_batch_norm_dx(float *dx, const float *dy, const float *x, const float *gamma,
                      const float *stats, int32_t pixels, int32_t c);
/* one mean and variance for each run of c / groups channels over all pixels; a sum over a group is
   the sum over its channels of their sums over pixels.  gamma and beta may be NULL; stats, 2 *
   groups floats, means and then rstds, may be NULL.  May be in place. */
void mo_group_norm_forward(float *y, const float *x, const float *gamma, const float *beta,
                           float *stats, int32_t pixels, int32_t c, int32_t groups, float eps,
                           float lo, float hi);
/* gamma may be NULL; may be in place on dy */
void mo_group_norm_dx(float *dx, const float *dy, const float *x, const float *gamma,
                      const float *stats, int32_t pixels, int32_t c, int32_t groups);
void mo_group_norm_dgamma(float *dgamma, const float *dy, const float *x, const float *stats,
                          int32_t pixels, int32_t c, int32_t groups, int accumulate);
/* The gradients of y = gamma * (conv(x, w) + bias - mean) * rstd with respect to gamma and w, from
   g = mo_conv2d_dw or mo_depthwise_dw of dy: first the start of dgamma, bias may be NULL,
   dgamma[j] = (bias[j] - mean[j]) * rstd[j] * sum over pixels of dy[j] */
void mo_norm_dgamma_start(float *dgamma, const float *dy, const float *mean, const float *rstd,
                          const float *bias, int32_t pixels, int32_t c, int accumulate);
/* then, for the rows [row0, row1) of g, dgamma[r] += rstd[r] * (w_row . g_row) and g_row *=
   gamma[r] * rstd[r]; g and w point at row row0 */
void mo_norm_dw_rows(float *g, float *dgamma, const float *w, const float *gamma,
                     const float *rstd, int32_t row0, int32_t row1, int32_t row_elems);
/* or the same for `taps` kernel positions of a depthwise convolution, [taps][c]; g and w point at
   the first of them */
void mo_norm_dw_channels(float *g, float *dgamma, const float *w, const float *gamma,
                         const float *rstd, int32_t taps, int32_t c);
/* each row: out = (w - mean) / sqrt(variance + eps), with the biased variance */
void mo_standardise(float *out, const float *w, int32_t rows, int32_t row_elems, float eps);
/* g, the gradient with respect to out, becomes that with respect to w; both at the same row */
void mo_standardise_dw(float *g, const float *w, int32_t rows, int32_t row_elems, float eps);

/* ---- resize.c: scale is the step in the input for one of the output: in / out or 1 / the scale
        factor given; with align_corners (in - 1) / (out - 1), 0 for a single output.  dx: pixels
        of dy in raster order. ---- */
void mo_resize_nearest_forward(float *y, const float *x, int32_t in_h, int32_t in_w,
                               int32_t out_h, int32_t out_w, int32_t c, float scale_h,
                               float scale_w);
void mo_resize_nearest_backward(float *dx, const float *dy, int32_t in_h, int32_t in_w,
                                int32_t out_h, int32_t out_w, int32_t c, float scale_h,
                                float scale_w);
void mo_resize_bilinear_forward(float *y, const float *x, int32_t in_h, int32_t in_w,
                                int32_t out_h, int32_t out_w, int32_t c, float scale_h,
                                float scale_w, int align_corners);
void mo_resize_bilinear_backward(float *dx, const float *dy, int32_t in_h, int32_t in_w,
                                 int32_t out_h, int32_t out_w, int32_t c, float scale_h,
                                 float scale_w, int align_corners);

/* ---- pool.c ---- */
/* code (may be NULL) keeps the winning position kh * k_w + kw in `bits` bits per output element,
   elements in memory order, LSB first; bits is 2, 4 or 8.  Padding never wins; the first maximum
   in raster order wins. */
void mo_maxpool_forward(float *y, uint8_t *code, const float *x, const mo_pool_t *g, int bits);
void mo_maxpool_backward(float *dx, const float *dy, const uint8_t *code, const mo_pool_t *g,
                         int bits);
/* divisor > 0 overrides; otherwise the window's size as PyTorch counts it: with include_pad the
   window clipped to the padded input (in + pad_t + pad_b), else clipped to the input */
void mo_avgpool_forward(float *y, const float *x, const mo_pool_t *g, int include_pad,
                        int32_t divisor);
void mo_avgpool_backward(float *dx, const float *dy, const mo_pool_t *g, int include_pad,
                         int32_t divisor);
/* window i covers floor(i * in / out) .. ceil((i + 1) * in / out); a 1x1 output is the mean */
void mo_adaptive_avgpool_forward(float *y, const float *x, int32_t in_h, int32_t in_w,
                                 int32_t out_h, int32_t out_w, int32_t c);
void mo_adaptive_avgpool_backward(float *dx, const float *dy, int32_t in_h, int32_t in_w,
                                  int32_t out_h, int32_t out_w, int32_t c);

/* ---- move.c: additions, products, copies, gathers ---- */
/* y = clamp(a + b); may be in place on a or b */
void mo_add(float *y, const float *a, const float *b, int32_t n, float lo, float hi);
/* y = a * b; b has `pixels` pixels or, a gate per channel, one.  May be in place on a, and on b
   where it has as many. */
void mo_mul(float *y, const float *a, const float *b, int32_t pixels, int32_t c,
            int32_t b_pixels);
/* db[j] = sum over pixels of dy[j] * a[j], for a b of one pixel */
void mo_mul_dgate(float *db, const float *dy, const float *a, int32_t pixels, int32_t c);
/* `blocks` runs of `len` floats, strides in floats; accumulate adds instead of copying */
void mo_copy_blocks(float *dst, int32_t dst_stride, const float *src, int32_t src_stride,
                    int32_t blocks, int32_t len, int accumulate);
/* dst[r][j] = src[r][idx[j]] for r < rows; src has c columns, dst n */
void mo_gather(float *dst, const float *src, const uint16_t *idx, int32_t rows, int32_t c,
               int32_t n);
/* dst[c][r] = src[r][c] */
void mo_transpose(float *dst, const float *src, int32_t rows, int32_t cols);
/* full = base with the trained slice laid over it: full[out[a]][t][in[b]] = slice[a][t][b];
   a NULL index list means all */
void mo_assemble(float *full, const float *base, const float *slice, const uint16_t *out_idx,
                 int32_t n_out, const uint16_t *in_idx, int32_t n_in, int32_t rows, int32_t taps,
                 int32_t cols);

/* ---- cosine.c ---- */
/* y[k] = scale (x . c_k / (|x| |c_k|) + bias), with lengths of at least 1e-8 */
void mo_cosine_forward(float *y, const float *x, const float *prototypes, const float *scale,
                       const float *bias, int32_t features, int32_t ways);
void mo_cosine_dx(float *dx, const float *dy, const float *x, const float *prototypes,
                  const float *scale, int32_t features, int32_t ways, int accumulate);
/* prototype `label` += x; returns 0, and adds nothing, where a sum is not finite */
int mo_prototype_add(float *prototypes, const float *x, int32_t label, int32_t features);
/* score[j] = (sum over pixels of dy[j] * x[j])^2 / 2 */
void mo_fisher(float *score, const float *dy, const float *x, int32_t pixels, int32_t c,
               int accumulate);

/* ---- attention.c: gates of channels, 0 where one is left out; NULL gates let all through.  Chosen
        channels lie side by side, in their order; `most` bounds how many there are ---- */
/* sums[j] += |x[j]| over pixels */
void mo_magnitudes(float *sums, const float *x, int32_t pixels, int32_t c);
/* v = scale sums, s = softmax(up relu(down v / (mean v + 1e-12) + down_bias) + up_bias): the largest
   s are kept until their sum exceeds rho, of equal ones the first, and scaled to a mean of 1.
   down is [width][channels], hidden has room for width floats; sums are overwritten */
void mo_gates(float *gates, float *sums, float *hidden, const float *down, const float *down_bias,
              const float *up, const float *up_bias, int32_t channels, int32_t width, float scale,
              float rho, int32_t most);
/* the chosen ones of c channels in each of the rows of src */
void mo_gather_gated(float *dst, const float *src, const float *gates, int32_t rows, int32_t c,
                     int32_t most);
/* the gradient of a bias for the chosen ones of the c channels of dy */
void mo_gated_bias_grad(float *db, const float *dy, const float *gates, int32_t pixels, int32_t c,
                        int32_t most, int accumulate);
/* dw[a][tap][b] of the a-th chosen output and the b-th chosen input channel, without their gates;
   x, and dy where g has one group, are gathered already */
void mo_gated_dw(float *dw, const float *dy, const float *x, const float *fw, const float *bw,
                 const mo_conv_t *g, int32_t most_in, int32_t most_out, int accumulate);
/* w -= lr * bw * fw * g for what is chosen of w, whose rows and taps are so many floats apart */
void mo_gated_step(float *w, const float *g, const float *fw, const float *bw, int32_t rows,
                   int32_t taps, int32_t columns, int32_t row, int32_t tap, int32_t most_out,
                   int32_t most_in, float lr);

/* ---- loss.c: own exp and log (no libm), relative error below 1e-6 ---- */
float mo_exp(float x);
float mo_log(float x);
/* returns the cross-entropy of softmax(z) and replaces z by scale * (softmax(z) - onehot) */
float mo_cross_entropy(float *z, int32_t n, int32_t label, float scale);
/* returns mean (z - target)^2 and replaces z by scale * 2 (z - target) / n */
float mo_mse(float *z, const float *target, int32_t n, float scale);

/* ---- optim.c: in place on w (and state) over n contiguous floats; g gains weight_decay * w ---- */
void mo_sgd(float *w, const float *g, int32_t n, float lr, float weight_decay);
/* v = momentum * v + g; w -= lr * v */
void mo_momentum(float *w, const float *g, float *v, int32_t n, float lr, float momentum,
                 float weight_decay);
/* c1 = 1 - beta1^t, c2 = 1 - beta2^t; w -= lr * (m / c1) / (sqrt(v / c2) + eps), as PyTorch */
void mo_adam(float *w, const float *g, float *m, float *v, int32_t n, float lr, float beta1,
             float beta2, float eps, float c1, float c2, float weight_decay);
/* the same, where w is not updated every time: this is the t-th of its own updates, t > 0 */
void mo_adam_counted(float *w, const float *g, float *m, float *v, int32_t n, float lr,
                     float beta1, float beta2, float eps, uint32_t t, float weight_decay);

/* ---- guard.c ---- */
/* 1 if every one of n floats is finite (bit test, so -ffast-math cannot remove it) */
int mo_all_finite(const float *x, int32_t n);
/* CRC-32 (IEEE 802.3, reflected 0xEDB88320), crc starts at 0 and may be chained */
uint32_t mo_crc32(uint32_t crc, const void *data, size_t n);

#ifdef __cplusplus
}
#endif
#endif
