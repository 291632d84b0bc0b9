/* A net by hand, 4 -> 3 linear with softmax, which has the same API as an emitted one. */
#ifndef DEMO_H
#define DEMO_H

#include <stddef.h>
#include <stdint.h>

#if defined(MO_BUILD_SHARED)
#define MO_API __attribute__((visibility("default")))
#else
#define MO_API
#endif

#define DEMO_INPUTS 4
#define DEMO_OUTPUTS 3
#ifndef DEMO_TARGETS
#define DEMO_TARGETS 0
#endif
#define DEMO_ARENA 28 /* input, logits */
#define DEMO_TRAINED 15
#define DEMO_STATE (DEMO_TRAINED * 4)

typedef struct {
  float weight[DEMO_OUTPUTS][DEMO_INPUTS];
  float bias[DEMO_OUTPUTS];
  float arena[DEMO_ARENA / 4];
} demo_t;

MO_API int demo_init(demo_t *m);
MO_API float *demo_input(demo_t *m);
MO_API int demo_predict(demo_t *m, const float *x, float *logits);
#if DEMO_TARGETS > 0
MO_API int demo_train(demo_t *m, const float *x, const float *target, float *loss);
#else
MO_API int demo_train(demo_t *m, const float *x, int32_t label, float *loss);
#endif
MO_API size_t demo_export_state(const demo_t *m, uint8_t *blob, size_t capacity);
MO_API int demo_import_state(demo_t *m, const uint8_t *blob, size_t length);
MO_API const float *demo_trained(const demo_t *m, int32_t i, int32_t *count);
MO_API const char *demo_error(int code);

#endif
