/* `make check`: trains the net on the vectors of vectors.h and stops at the first step and tensor
   that differ from what PyTorch saw.  Exit 0 when nothing differs, 5 when something does. */
#include "net.h"
#include "port.h"

#include "vectors.h"

static mo_net_t net PORT_NET_SECTION;
static float logits[MO_NET_OUTPUTS];

static int32_t steps_compared, tensors_compared;
static float largest; /* difference / scale, over everything compared */

static float magnitude(float x)
{
  return x < 0.0f ? -x : x;
}

static float largest_magnitude(const float *x, int32_t n)
{
  float result = 0.0f;
  for (int32_t i = 0; i < n; i++) {
    result = magnitude(x[i]) > result ? magnitude(x[i]) : result;
  }
  return result;
}

static void print_place(int32_t step, const char *tensor)
{
  port_print(PORT_ERR, "check: ");
#if MO_NET_MEMBERS > 0
  port_print(PORT_ERR, "member ");
  port_print_i32(PORT_ERR, mo_net_selected(&net));
  port_print(PORT_ERR, ", ");
#endif
  port_print(PORT_ERR, "step ");
  port_print_i32(PORT_ERR, step);
  port_print(PORT_ERR, ", ");
  port_print(PORT_ERR, tensor);
}

static int fail(int32_t step, const char *call, int status)
{
  print_place(step, call);
  port_print(PORT_ERR, ": ");
  port_print(PORT_ERR, mo_net_error(status));
  port_print(PORT_ERR, "\n");
  return PORT_FAILED;
}

/* found[i * stride] against expected[i] */
static int compare(int32_t step, const char *tensor, const float *found, int32_t stride,
                   const float *expected, int32_t count, float scale)
{
  /* a tensor of zeros is compared absolutely */
  const float unit = scale > 0.0f ? scale : 1.0f;
  tensors_compared++;
  for (int32_t i = 0; i < count; i++) {
    const float got = found[i * stride];
    const float difference = magnitude(got - expected[i]) / unit;
    /* not `> tolerance`: a NaN must fail */
    if (!(difference <= MO_CHECK_TOLERANCE)) {
      print_place(step, tensor);
      port_print(PORT_ERR, " differs at element ");
      port_print_i32(PORT_ERR, i * stride);
      port_print(PORT_ERR, ": ");
      port_print_float(PORT_ERR, got);
      port_print(PORT_ERR, ", PyTorch has ");
      port_print_float(PORT_ERR, expected[i]);
      port_print(PORT_ERR, " (");
      port_print_float(PORT_ERR, difference);
      port_print(PORT_ERR, " of the scale ");
      port_print_float(PORT_ERR, unit);
      port_print(PORT_ERR, ")\n");
      return PORT_MISMATCH;
    }
    largest = difference > largest ? difference : largest;
  }
  return PORT_OK;
}

static int check_logits(int32_t step, const char *name, const float *input, const float *expected)
{
  if (expected == NULL) {
    return PORT_OK;
  }
  const int status = mo_net_predict(&net, input, logits);
  if (status != 0) {
    return fail(step, "predict", status);
  }
  return compare(step, name, logits, 1, expected, MO_NET_OUTPUTS,
                 largest_magnitude(expected, MO_NET_OUTPUTS));
}

static int check_tensor(int32_t step, const mo_check_tensor_t *tensor)
{
  int32_t count = 0;
  const float *slice = mo_net_trained(&net, tensor->slice, &count);
  const int32_t last = tensor->first + (tensor->count - 1) * tensor->stride;
  if (slice == NULL || last >= count) {
    print_place(step, tensor->name);
    port_print(PORT_ERR, ": the net trains no such elements; vectors.h is of another net\n");
    return PORT_FAILED;
  }
  return compare(step, tensor->name, slice + tensor->first, tensor->stride, tensor->expected,
                 tensor->count, tensor->scale);
}

static int check_step(int32_t step, const mo_check_step_t *expected)
{
  int code = check_logits(step, "logits before", expected->input, expected->logits_before);
  if (code != PORT_OK) {
    return code;
  }

  float loss = 0.0f;
#if MO_NET_TARGETS > 0
  const int status = mo_net_train(&net, expected->input, expected->target, &loss);
#else
  const int status = mo_net_train(&net, expected->input, expected->label, &loss);
#endif
  if (status != 0) {
    return fail(step, "train", status);
  }
  /* A small loss is a difference of large logits: it is no more exact than they are. */
  float scale = magnitude(expected->loss);
  if (expected->logits_before != NULL) {
    const float cancelled = 0.01f * largest_magnitude(expected->logits_before, MO_NET_OUTPUTS);
    scale = cancelled > scale ? cancelled : scale;
  }
  code = compare(step, "loss", &loss, 1, &expected->loss, 1, scale);

  for (int32_t i = 0; i < expected->tensor_count && code == PORT_OK; i++) {
    code = check_tensor(step, &expected->tensors[i]);
  }
  if (code == PORT_OK) {
    code = check_logits(step, "logits after", expected->input, expected->logits_after);
  }
  return code;
}

/* The initial state of a member, and prototypes of its samples. */
static int prepare(int32_t index, const mo_check_member_t *member)
{
#if MO_NET_MEMBERS > 0
  int status = mo_net_select(&net, index);
#else
  (void)index;
  int status = mo_net_init(&net);
#endif
#if MO_NET_PROTOTYPES
  status = status == 0 ? mo_net_prototypes_clear(&net) : status;
  for (int32_t step = 0; status == 0 && step < member->step_count; step++) {
    status = mo_net_prototypes_add(&net, member->steps[step].input, member->steps[step].label);
  }
#else
  (void)member;
#endif
  return status == 0 ? PORT_OK : fail(0, "init", status);
}

#if MO_NET_ATTEND
/* Before the first sample of an update: all of them, for the attention that chooses channels. */
static int attend(const mo_check_member_t *member, int32_t step)
{
  int status = 0;
  for (int32_t i = step; status == 0 && i < step + MO_NET_ATTEND && i < member->step_count; i++) {
#if MO_NET_TARGETS > 0
    status = mo_net_attend(&net, member->steps[i].input, member->steps[i].target);
#else
    status = mo_net_attend(&net, member->steps[i].input, member->steps[i].label);
#endif
  }
  return status == 0 ? PORT_OK : fail(step, "attend", status);
}
#endif

int main(int argc, char **argv)
{
  (void)argc;
  (void)argv;
  for (int32_t index = 0; index < MO_CHECK_MEMBERS; index++) {
    const mo_check_member_t *member = &mo_check_members[index];
    int code = prepare(index, member);
    for (int32_t step = 0; code == PORT_OK && step < member->step_count; step++) {
#if MO_NET_ATTEND
      code = step % MO_NET_ATTEND == 0 ? attend(member, step) : PORT_OK;
      if (code != PORT_OK) {
        return code;
      }
#endif
      code = check_step(step, &member->steps[step]);
      steps_compared++;
    }
    if (code != PORT_OK) {
      return code;
    }
  }
  port_print(PORT_OUT, "ok: ");
  port_print_i32(PORT_OUT, steps_compared);
  port_print(PORT_OUT, " steps, ");
  port_print_i32(PORT_OUT, tensors_compared);
  port_print(PORT_OUT, " tensors, largest difference ");
  port_print_float(PORT_OUT, largest);
  port_print(PORT_OUT, " of the scale\n");
  return PORT_OK;
}
