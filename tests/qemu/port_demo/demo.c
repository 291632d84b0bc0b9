#include "demo.h"

#include <string.h>

#ifndef DEMO_BALLAST
#define DEMO_BALLAST 4
#endif
extern const float demo_ballast[DEMO_BALLAST];

#define RATE 0.5f

enum { BAD_LABEL = -1, NOT_FINITE = -2, BAD_STATE = -3 };

#if DEMO_TARGETS == 0
/* e^x without libm, so that every target has the same bits */
static float exponential(float x)
{
  if (x < -80.0f) {
    return 0.0f;
  }
  const float k = x * 1.44269504f;
  const int32_t n = (int32_t)(k + (k < 0.0f ? -0.5f : 0.5f));
  const float r = x - (float)n * 0.693147180f;
  const float p =
      1.0f +
      r * (1.0f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * 0.00833333333f))));
  union {
    uint32_t bits;
    float value;
  } power;
  power.bits = (uint32_t)(n + 127) << 23;
  return p * power.value;
}

/* ln x for x >= 1: halving, then a series in (x - 1) / (x + 1) */
static float logarithm(float x)
{
  float result = 0.0f;
  while (x > 1.5f) {
    x *= 0.5f;
    result += 0.693147180f;
  }
  const float s = (x - 1.0f) / (x + 1.0f);
  const float q = s * s;
  return result + 2.0f * s * (1.0f + q * (0.333333333f + q * (0.2f + q * 0.142857143f)));
}
#endif

static int finite_inputs(const float *x)
{
  for (int i = 0; i < DEMO_INPUTS; i++) {
    if (!(x[i] - x[i] == 0.0f)) {
      return 0;
    }
  }
  return 1;
}

static float *logits_in(demo_t *m)
{
  return m->arena + DEMO_INPUTS;
}

int demo_init(demo_t *m)
{
  for (int o = 0; o < DEMO_OUTPUTS; o++) {
    m->bias[o] = 0.0f;
    for (int i = 0; i < DEMO_INPUTS; i++) {
      m->weight[o][i] = demo_ballast[DEMO_BALLAST - 1] * (float)(o - i);
    }
  }
  return 0;
}

float *demo_input(demo_t *m)
{
  return m->arena;
}

static void forward(demo_t *m, const float *x)
{
  if (x != m->arena) {
    memcpy(m->arena, x, DEMO_INPUTS * sizeof *x);
  }
  for (int o = 0; o < DEMO_OUTPUTS; o++) {
    float sum = m->bias[o];
    for (int i = 0; i < DEMO_INPUTS; i++) {
      sum += m->weight[o][i] * m->arena[i];
    }
    logits_in(m)[o] = sum;
  }
}

int demo_predict(demo_t *m, const float *x, float *logits)
{
  if (!finite_inputs(x)) {
    return NOT_FINITE;
  }
  forward(m, x);
  memcpy(logits, logits_in(m), DEMO_OUTPUTS * sizeof *logits);
  return 0;
}

static void update(demo_t *m, const float *gradient)
{
#if defined(DEMO_OVERRUN)
  /* a fault to be found: a write DEMO_OVERRUN floats past the end of the arena */
  volatile float *arena = m->arena;
  arena[DEMO_ARENA / 4 + DEMO_OVERRUN - 1] = 1.0f;
#endif
  for (int o = 0; o < DEMO_OUTPUTS; o++) {
    for (int i = 0; i < DEMO_INPUTS; i++) {
      m->weight[o][i] -= RATE * gradient[o] * m->arena[i];
    }
    m->bias[o] -= RATE * gradient[o];
  }
}

#if DEMO_TARGETS > 0
int demo_train(demo_t *m, const float *x, const float *target, float *loss)
{
  if (!finite_inputs(x)) {
    return NOT_FINITE;
  }
  forward(m, x);
  float *z = logits_in(m);
  *loss = 0.0f;
  for (int o = 0; o < DEMO_OUTPUTS; o++) {
    z[o] -= target[o];
    *loss += z[o] * z[o] / (float)DEMO_OUTPUTS;
    z[o] *= 2.0f / (float)DEMO_OUTPUTS;
  }
  update(m, z);
  return 0;
}
#else
int demo_train(demo_t *m, const float *x, int32_t label, float *loss)
{
  if (label < 0 || label >= DEMO_OUTPUTS) {
    return BAD_LABEL;
  }
  if (!finite_inputs(x)) {
    return NOT_FINITE;
  }
  forward(m, x);
  float *z = logits_in(m);
  float most = z[0];
  for (int o = 1; o < DEMO_OUTPUTS; o++) {
    most = z[o] > most ? z[o] : most;
  }
  const float shifted = z[label] - most;
  float total = 0.0f;
  for (int o = 0; o < DEMO_OUTPUTS; o++) {
    z[o] = exponential(z[o] - most);
    total += z[o];
  }
  *loss = logarithm(total) - shifted;
  for (int o = 0; o < DEMO_OUTPUTS; o++) {
    z[o] = z[o] / total - (o == label ? 1.0f : 0.0f);
  }
  update(m, z);
  return 0;
}
#endif

size_t demo_export_state(const demo_t *m, uint8_t *blob, size_t capacity)
{
  if (capacity < DEMO_STATE) {
    return 0;
  }
  memcpy(blob, m->weight, sizeof m->weight);
  memcpy(blob + sizeof m->weight, m->bias, sizeof m->bias);
  return DEMO_STATE;
}

int demo_import_state(demo_t *m, const uint8_t *blob, size_t length)
{
  if (length != DEMO_STATE) {
    return BAD_STATE;
  }
  memcpy(m->weight, blob, sizeof m->weight);
  memcpy(m->bias, blob + sizeof m->weight, sizeof m->bias);
  return 0;
}

const float *demo_trained(const demo_t *m, int32_t i, int32_t *count)
{
  *count = i == 0 ? DEMO_OUTPUTS * DEMO_INPUTS : DEMO_OUTPUTS;
  return i == 0 ? &m->weight[0][0] : i == 1 ? m->bias : NULL;
}

const char *demo_error(int code)
{
  switch (code) {
  case 0:
    return "ok";
  case BAD_LABEL:
    return "the label is out of range";
  case NOT_FINITE:
    return "an input is not finite";
  default:
    return "the state is not of this net";
  }
}
