/* The test vectors that vectors.h holds: what PyTorch saw when it trained the same net on the same
   samples.  vectors.h is generated; it includes this file and defines

     static const mo_check_member_t mo_check_members[MO_CHECK_MEMBERS]
     #define MO_CHECK_MEMBERS    n          1, or the members of a candidate set
     #define MO_CHECK_TOLERANCE  1e-4f      the largest |difference| / scale that passes */
#ifndef MO_CHECK_H
#define MO_CHECK_H

#include <stdint.h>

/* Elements first, first + stride, ... of a trained slice, after the step.  A large slice need not
   be compared whole. */
typedef struct {
  const char *name;      /* as the model calls the parameter */
  int32_t slice;         /* i of mo_net_trained(m, i, ..) */
  int32_t first, stride; /* in floats */
  int32_t count;         /* of expected[] */
  float scale;           /* the largest magnitude in the whole slice */
  const float *expected;
} mo_check_tensor_t;

typedef struct {
  const float *input;         /* MO_NET_INPUTS floats, [h][w][c] */
  int32_t label;              /* cross-entropy; 0 otherwise */
  const float *target;        /* mse: MO_NET_TARGETS floats; NULL otherwise */
  const float *logits_before; /* MO_NET_OUTPUTS floats of predict before the step; NULL: skip */
  float loss;
  const float *logits_after;  /* the same after the step; NULL: skip */
  int32_t tensor_count;
  const mo_check_tensor_t *tensors;
} mo_check_step_t;

typedef struct {
  int32_t step_count;
  const mo_check_step_t *steps;
} mo_check_member_t;

#endif
