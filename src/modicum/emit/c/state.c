#include "mo_state.h"

#include "mo_kernels.h"

#include <string.h>

static const uint8_t magic[4] = {'M', 'O', 'S', 'T'};

enum { AT_VERSION = 4, AT_PLAN = 8, AT_BYTES = 24, AT_PROGRESS = 28 };

const char *mo_status_text(int status)
{
  switch (status) {
  case MO_OK: return "ok";
  case MO_E_INIT: return "the net was not initialised";
  case MO_E_INPUT: return "an input or a target is not finite";
  case MO_E_LABEL: return "the label is out of range";
  case MO_E_LOSS: return "the loss is not finite; nothing was updated";
  case MO_E_LENGTH: return "the state has the wrong length";
  case MO_E_FORMAT: return "not a state of this version";
  case MO_E_PLAN: return "the state belongs to another plan";
  case MO_E_CRC: return "the state is damaged";
  case MO_E_VALUE: return "the state holds values that no training can reach";
  case MO_E_FEATURES: return "the features are not finite; no prototype changed";
  case MO_E_MEMBER: return "there is no such member";
  case MO_E_ATTEND: return "an update attends to all its samples, then learns from all of them";
  default: return "unknown status";
  }
}

static uint32_t word_at(const uint8_t *blob, size_t at)
{
  uint32_t word;
  memcpy(&word, blob + at, sizeof word);
  return word;
}

static float float_at(const uint8_t *blob, size_t at)
{
  float value;
  memcpy(&value, blob + at, sizeof value);
  return value;
}

size_t mo_state_write(uint8_t *blob, size_t capacity, const uint8_t plan[16],
                      const mo_progress_t *progress, const float *payload, uint32_t bytes)
{
  const uint32_t version = MO_STATE_VERSION;
  const size_t length = MO_STATE_BYTES((size_t)bytes);
  if (blob == NULL || capacity < length) {
    return 0;
  }
  memcpy(blob, magic, sizeof magic);
  memcpy(blob + AT_VERSION, &version, sizeof version);
  memcpy(blob + AT_PLAN, plan, 16);
  memcpy(blob + AT_BYTES, &bytes, sizeof bytes);
  memcpy(blob + AT_PROGRESS, progress, sizeof *progress);
  memcpy(blob + MO_STATE_HEAD, payload, bytes);
  const uint32_t crc = mo_crc32(0, blob, length - 4u);
  memcpy(blob + length - 4u, &crc, sizeof crc);
  return length;
}

/* A fraction 1 - beta^t lies in [0, 1]. */
static int is_fraction(float c)
{
  return c >= 0.0f && c <= 1.0f;
}

int mo_state_check(const uint8_t *blob, size_t length, const uint8_t plan[16], uint32_t bytes,
                   uint32_t accumulate, const uint32_t (*not_negative)[2], int32_t runs)
{
  if (blob == NULL || length != MO_STATE_BYTES((size_t)bytes)) {
    return MO_E_LENGTH;
  }
  if (memcmp(blob, magic, sizeof magic) != 0 || word_at(blob, AT_VERSION) != MO_STATE_VERSION) {
    return MO_E_FORMAT;
  }
  if (memcmp(blob + AT_PLAN, plan, 16) != 0) {
    return MO_E_PLAN;
  }
  if (word_at(blob, AT_BYTES) != bytes) {
    return MO_E_LENGTH;
  }
  if (mo_crc32(0, blob, length - 4u) != word_at(blob, length - 4u)) {
    return MO_E_CRC;
  }
  if (word_at(blob, AT_PROGRESS + 4) >= accumulate || !is_fraction(float_at(blob, AT_PROGRESS + 8)) ||
      !is_fraction(float_at(blob, AT_PROGRESS + 12))) {
    return MO_E_VALUE;
  }
  for (uint32_t at = 0; at < bytes; at += 4u) {
    const uint32_t bits = word_at(blob, MO_STATE_HEAD + (size_t)at);
    if ((bits & 0x7F800000u) == 0x7F800000u) {
      return MO_E_VALUE;
    }
  }
  for (int32_t run = 0; run < runs; run++) {
    for (uint32_t i = 0; i < not_negative[run][1]; i++) {
      const size_t at = MO_STATE_HEAD + 4u * ((size_t)not_negative[run][0] + i);
      if (!(float_at(blob, at) >= 0.0f)) {
        return MO_E_VALUE;
      }
    }
  }
  return MO_OK;
}

uint32_t mo_state_steps(const uint8_t *blob)
{
  return word_at(blob, AT_PROGRESS);
}

void mo_state_read(const uint8_t *blob, mo_progress_t *progress, float *payload, uint32_t bytes)
{
  memcpy(progress, blob + AT_PROGRESS, sizeof *progress);
  memcpy(payload, blob + MO_STATE_HEAD, bytes);
}
