/* Runs every kernel on generated cases and prints one digest of the output bits of each.  With
   -ffp-contract=off the lines are the same on every target. */
#include "mo_kernels.h"

void print(const char *text);

enum { POOL = 60000, CASES = 30 };
static float pool[POOL];
static int32_t used;
static uint32_t state, digest;

static uint32_t bits32(void) {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

static int32_t between(int32_t low, int32_t high) {
  return low + (int32_t)(bits32() % (uint32_t)(high - low + 1));
}

static float *filled(int32_t n) {
  float *p = pool + used;
  for (int32_t i = 0; i < n; i++) p[i] = (float)(int32_t)bits32() / 8388608.0f - 1.0f;
  used += n;
  return p;
}

static void add(const void *data, int32_t bytes) {
  digest = mo_crc32(digest, data, (size_t)bytes);
}

static void add_floats(const float *x, int32_t n) { add(x, n * (int32_t)sizeof(float)); }

static void convolution(int depthwise) {
  mo_conv_t g;
  g.groups = between(0, 3) ? 1 : 2;
  g.in_c = g.groups * between(1, 9);
  g.out_c = g.groups * between(1, 40);
  if (depthwise) g.in_c = g.out_c = g.groups = between(1, 70);
  g.k_h = between(1, depthwise ? 7 : 3);
  g.k_w = between(1, depthwise ? 7 : 3);
  g.stride_h = between(1, 2);
  g.stride_w = between(1, 2);
  g.dil_h = between(0, 3) ? 1 : 2;
  g.dil_w = between(0, 3) ? 1 : 2;
  g.pad_t = between(0, g.k_h / 2);
  g.pad_l = between(0, g.k_w / 2);
  g.in_h = between(1, 6) + (g.k_h - 1) * g.dil_h;
  g.in_w = between(1, 6) + (g.k_w - 1) * g.dil_w;
  g.out_h = (g.in_h + g.pad_t - (g.k_h - 1) * g.dil_h - 1) / g.stride_h + 1;
  g.out_w = (g.in_w + g.pad_l - (g.k_w - 1) * g.dil_w - 1) / g.stride_w + 1;
  const int32_t nx = g.in_h * g.in_w * g.in_c, ny = g.out_h * g.out_w * g.out_c;
  const int32_t nw = g.out_c * g.k_h * g.k_w * (g.in_c / g.groups);
  float *x = filled(nx), *w = filled(nw), *b = filled(g.out_c), *y = filled(ny);
  float *dx = filled(nx), *dw = filled(nw);
  const int accumulate = between(0, 1);
  if (depthwise) {
    mo_depthwise_forward(y, x, w, b, &g, 0.0f, 0.5f);
    mo_depthwise_dx(dx, y, w, &g, accumulate);
    mo_depthwise_dw(dw, y, x, &g, 0, g.k_h, accumulate);
  } else {
    mo_conv2d_forward(y, x, w, b, &g, 0.0f, 0.5f);
    mo_conv2d_dx(dx, y, w, &g, accumulate);
    mo_conv2d_dw(dw, y, x, &g, 0, g.out_c, accumulate);
  }
  add_floats(y, ny);
  add_floats(dx, nx);
  add_floats(dw, nw);
}

static void conv2d(void) { convolution(0); }
static void depthwise(void) { convolution(1); }

static void linear(void) {
  const int32_t in = between(1, 150), out = between(1, 90), pixels = between(1, 9);
  const mo_conv_t g = {1, pixels, in, 1, pixels, out, 1, 1, 1, 1, 0, 0, 1, 1, 1};
  float *x = filled(pixels * in), *w = filled(out * in), *y = filled(pixels * out);
  mo_conv2d_forward(y, x, w, NULL, &g, MO_NO_LO, MO_NO_HI);
  add_floats(y, pixels * out);
  mo_conv2d_dx(x, y, w, &g, 0);
  add_floats(x, pixels * in);
  mo_conv2d_dw(w, y, x, &g, 0, out, 0);
  add_floats(w, out * in);
}

static void affine(void) {
  const int32_t pixels = between(1, 20), c = between(1, 50), n = pixels * c;
  float *x = filled(n), *y = filled(n), *p = filled(6 * c);
  mo_affine_forward(y, x, p, p + c, p + 2 * c, p + 3 * c, pixels, c, -0.5f, MO_NO_HI);
  add_floats(y, n);
  mo_affine_dx(y, x, p, p + c, pixels, c);
  add_floats(y, n);
  mo_affine_dgamma(p + 4 * c, y, x, p, p + c, pixels, c, 0);
  mo_bias_grad(p + 5 * c, x, pixels, c, 1);
  add_floats(p + 4 * c, 2 * c);
}

static void pointwise(void) {
  uint8_t mask[50];
  const int32_t n = between(1, 400);
  float *x = filled(n), *y = filled(n);
  mo_clamp_forward(y, x, n, -0.25f, 0.5f);
  add_floats(y, n);
  mo_mask_pack(mask, y, n, -0.25f, 0.5f);
  add(mask, (n + 7) / 8);
  mo_mask_backward(y, x, mask, n);
  add_floats(y, n);
  mo_clamp_backward(y, x, y, n, 0.0f, 0.5f);
  mo_add(y, y, x, n, -0.5f, MO_NO_HI);
  add_floats(y, n);
}

static void pool2d(void) {
  static const mo_pool_t shapes[] = {{8, 9, 20, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0, 1, 1},
                                     {7, 7, 5, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1},
                                     {5, 6, 33, 5, 6, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1}};
  uint8_t code[1000];
  const mo_pool_t *g = &shapes[between(0, 2)];
  const int32_t nx = g->in_h * g->in_w * g->c, ny = g->out_h * g->out_w * g->c;
  float *x = filled(nx), *y = filled(ny);
  mo_maxpool_forward(y, code, x, g, 4);
  add(code, (ny + 1) / 2);
  add_floats(y, ny);
  mo_maxpool_backward(x, y, code, g, 4);
  add_floats(x, nx);
  mo_avgpool_forward(y, x, g, 0, 0);
  add_floats(y, ny);
  mo_avgpool_backward(x, y, g, 1, 0);
  add_floats(x, nx);
  mo_adaptive_avgpool_forward(y, x, g->in_h, g->in_w, 2, 3, g->c);
  mo_adaptive_avgpool_backward(x, y, g->in_h, g->in_w, 2, 3, g->c);
  add_floats(x, nx);
}

static void loss(void) {
  const int32_t n = between(1, 40);
  float *z = filled(n), *target = filled(n);
  for (int32_t i = 0; i < n; i++) z[i] *= 20.0f;
  float values[2];
  values[0] = mo_cross_entropy(z, n, between(0, n - 1), 0.25f);
  add_floats(z, n);
  values[1] = mo_mse(z, target, n, 1.0f);
  add_floats(z, n);
  add_floats(values, 2);
}

static void optimizers(void) {
  const int32_t n = between(1, 100);
  float *w = filled(n), *g = filled(n), *m = filled(n), *v = filled(n);
  for (int32_t i = 0; i < n; i++) v[i] = v[i] * v[i];
  mo_sgd(w, g, n, 0.1f, 0.01f);
  mo_momentum(w, g, m, n, 0.1f, 0.9f, 0.0f);
  mo_adam(w, g, m, v, n, 0.01f, 0.9f, 0.999f, 1e-8f, 0.1f, 0.001f, 0.01f);
  mo_adam_counted(w, g, m, v, n, 0.01f, 0.9f, 0.999f, 1e-8f, 77u, 0.01f);
  add_floats(w, n);
  add_floats(m, n);
  add_floats(v, n);
}

static void curves(void) {
  static void (*const forward[])(float *, const float *, int32_t) = {
      mo_hardswish_forward, mo_hardsigmoid_forward, mo_sigmoid_forward, mo_silu_forward};
  static void (*const backward[])(float *, const float *, const float *, int32_t) = {
      mo_hardswish_backward, mo_sigmoid_backward, mo_silu_backward, mo_sign_backward};
  uint8_t mask[50];
  const int32_t n = between(1, 400);
  float *x = filled(n), *dy = filled(n), *y = filled(n);
  const float range = between(0, 1) ? 5.0f : 100.0f;
  for (int32_t i = 0; i < n; i++) x[i] *= range;
  for (int i = 0; i < 4; i++) {
    forward[i](y, x, n);
    add_floats(y, n);
    backward[i](y, dy, i == 1 ? y : x, n);
    add_floats(y, n);
  }
  mo_sign_pack(mask, x, n);
  add(mask, (n + 7) / 8);
  mo_mask_pack(mask, x, n, -3.0f, 3.0f);
  mo_hardsigmoid_backward(dy, dy, mask, n);
  add_floats(dy, n);
  mo_clamp_forward(y, x, n, -0.0f, 6.0f);
  add_floats(y, n);
}

static void product(void) {
  const int32_t pixels = between(1, 20), c = between(1, 50), n = pixels * c;
  float *a = filled(n), *b = filled(n), *y = filled(n);
  mo_mul(y, a, b, pixels, c, pixels);
  mo_mul(a, a, b, pixels, c, 1);
  mo_mul_dgate(b, y, a, pixels, c);
  add_floats(y, n);
  add_floats(a, n);
  add_floats(b, c);
}

static void norms(void) {
  const int32_t groups = between(1, 4), c = groups * between(1, 20), pixels = between(2, 20);
  const int32_t n = pixels * c;
  float *x = filled(n), *y = filled(n), *dx = filled(n), *p = filled(4 * c), *stats = filled(2 * c);
  float *gamma = p, *mean = p + 2 * c, *var = p + 3 * c;
  for (int32_t j = 0; j < c; j++) var[j] = var[j] * var[j];
  mo_batch_norm_forward(y, x, gamma, p + c, mean, var, NULL, pixels, c, 1e-3f, -0.0f, 6.0f);
  add_floats(y, n);
  mo_batch_norm_forward(y, x, gamma, p + c, mean, var, stats, pixels, c, 1e-3f, MO_NO_LO, MO_NO_HI);
  mo_batch_norm_follow(mean, var, stats, pixels, c, 1e-3f, 0.1f);
  mo_batch_norm_dx(dx, y, x, gamma, stats, pixels, c);
  add_floats(y, n);
  add_floats(dx, n);
  add_floats(stats, 2 * c);
  add_floats(mean, 2 * c);
  mo_group_norm_forward(y, x, gamma, p + c, stats, pixels, c, groups, 1e-3f, -0.5f, MO_NO_HI);
  mo_group_norm_dx(dx, y, x, gamma, stats, pixels, c, groups);
  mo_group_norm_dgamma(mean, y, x, stats, pixels, c, groups, between(0, 1));
  add_floats(y, n);
  add_floats(dx, n);
  add_floats(stats, 2 * groups);
  add_floats(mean, c);
}

static void weight_norms(void) {
  const int32_t rows = between(1, 20), elems = between(1, 40), pixels = between(1, 20);
  float *dy = filled(pixels * rows), *w = filled(rows * elems), *g = filled(rows * elems);
  float *p = filled(5 * rows), *dgamma = p, *gamma = p + rows, *rstd = p + 2 * rows;
  mo_norm_dgamma_start(dgamma, dy, p + 3 * rows, rstd, p + 4 * rows, pixels, rows, between(0, 1));
  mo_norm_dw_rows(g, dgamma, w, gamma, rstd, 0, rows, elems);
  mo_norm_dw_channels(g, dgamma, w, gamma, rstd, elems, rows);
  add_floats(dgamma, rows);
  add_floats(g, rows * elems);
  mo_standardise_dw(g, w, rows, elems, 1e-3f);
  add_floats(g, rows * elems);
  mo_standardise(g, w, rows, elems, 1e-3f);
  add_floats(g, rows * elems);
}

static void resize(void) {
  const int32_t h = between(1, 7), w = between(1, 7), c = between(1, 40);
  const int32_t out_h = between(1, 12), out_w = between(1, 12), align = between(0, 1);
  float *x = filled(h * w * c), *y = filled(out_h * out_w * c);
  float scale_h = (float)h / (float)out_h, scale_w = (float)w / (float)out_w;
  mo_resize_nearest_forward(y, x, h, w, out_h, out_w, c, scale_h, scale_w);
  add_floats(y, out_h * out_w * c);
  mo_resize_nearest_backward(x, y, h, w, out_h, out_w, c, scale_h, scale_w);
  add_floats(x, h * w * c);
  if (align) {
    scale_h = out_h > 1 ? (float)(h - 1) / (float)(out_h - 1) : 0.0f;
    scale_w = out_w > 1 ? (float)(w - 1) / (float)(out_w - 1) : 0.0f;
  }
  mo_resize_bilinear_forward(y, x, h, w, out_h, out_w, c, scale_h, scale_w, align);
  add_floats(y, out_h * out_w * c);
  mo_resize_bilinear_backward(x, y, h, w, out_h, out_w, c, scale_h, scale_w, align);
  add_floats(x, h * w * c);
}

static void cosine(void) {
  const int32_t features = between(1, 90), ways = between(1, 12);
  float *x = filled(features), *c = filled(ways * features), *head = filled(2);
  float *y = filled(ways), *dx = filled(features);
  mo_cosine_forward(y, x, c, head, head + 1, features, ways);
  add_floats(y, ways);
  mo_cosine_dx(dx, y, x, c, head, features, ways, between(0, 1));
  add_floats(dx, features);
  mo_prototype_add(c, x, between(0, ways - 1), features);
  add_floats(c, ways * features);
}

static void fisher(void) {
  const int32_t pixels = between(1, 20), c = between(1, 50);
  float *x = filled(pixels * c), *dy = filled(pixels * c), *score = filled(c);
  mo_fisher(score, dy, x, pixels, c, between(0, 1));
  add_floats(score, c);
}

static void attention(void) {
  const int32_t pixels = between(1, 20), c = between(1, 50), width = between(1, 12);
  const int32_t most = between(1, c);
  float *x = filled(pixels * c), *sums = filled(c), *gates = filled(c), *hidden = filled(width);
  float *down = filled(width * c), *down_bias = filled(width), *up = filled(c * width);
  float *some = filled(pixels * c), *bias = filled(c);
  for (int32_t j = 0; j < c; j++) sums[j] = sums[j] < 0.0f ? -sums[j] : sums[j];
  mo_magnitudes(sums, x, pixels, c);
  mo_gates(gates, sums, hidden, down, down_bias, up, bias, c, width, 0.1f, 0.7f, most);
  add_floats(gates, c);
  mo_gather_gated(some, x, gates, pixels, c, most);
  add_floats(some, pixels * c);
  mo_gated_bias_grad(some, x, gates, pixels, c, most, between(0, 1));
  mo_gated_step(bias, some, NULL, gates, c, 1, 1, 1, 1, most, 1, 0.5f);
  add_floats(bias, c);
}

static void run(const char *name, void (*kernel)(void)) {
  char hex[] = " 00000000\n";
  digest = 0;
  state = 1;
  for (int i = 0; i < CASES; i++) {
    used = 0;
    kernel();
  }
  for (int i = 0; i < 8; i++) hex[8 - i] = "0123456789abcdef"[(digest >> (4 * i)) & 15u];
  print(name);
  print(hex);
}

int main(void) {
  run("conv2d", conv2d);
  run("depthwise", depthwise);
  run("linear", linear);
  run("affine", affine);
  run("pointwise", pointwise);
  run("pool", pool2d);
  run("loss", loss);
  run("optimizers", optimizers);
  run("curves", curves);
  run("product", product);
  run("norms", norms);
  run("weight norms", weight_norms);
  run("resize", resize);
  run("cosine", cosine);
  run("fisher", fisher);
  run("attention", attention);
  return 0;
}
