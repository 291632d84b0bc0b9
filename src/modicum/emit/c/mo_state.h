/* What every emitted net shares: status codes, and the blob that carries what was learned. */
#ifndef MO_STATE_H
#define MO_STATE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  MO_OK = 0,
  MO_E_INIT = -1,      /* the net was not initialised */
  MO_E_INPUT = -2,     /* an input or a target is not finite */
  MO_E_LABEL = -3,     /* the label is out of range */
  MO_E_LOSS = -4,      /* the loss is not finite; nothing was updated */
  MO_E_LENGTH = -5,    /* the blob has the wrong length */
  MO_E_FORMAT = -6,    /* not a state blob of this version */
  MO_E_PLAN = -7,      /* a blob of another plan */
  MO_E_CRC = -8,       /* the blob is damaged */
  MO_E_VALUE = -9,     /* the blob holds values that no training can reach */
  MO_E_FEATURES = -10, /* the features of a sample are not finite; no prototype changed */
  MO_E_MEMBER = -11,   /* there is no such member of the set */
  MO_E_ATTEND = -12    /* a sample to learn before all were attended to, or the other way round */
};

const char *mo_status_text(int status);

/* blob: 'MOST' version | plan hash, 16 bytes | payload length | steps collected | c1 c2 |
   payload | CRC-32 of all before; words of 32 bits, little-endian */
#define MO_STATE_VERSION 1u
#define MO_STATE_HEAD 44u
#define MO_STATE_BYTES(payload) (MO_STATE_HEAD + (payload) + 4u)

/* Counters of training: updates done, samples collected for the next one, and Adam's bias
   corrections 1 - beta^t. */
typedef struct {
  uint32_t steps, collected;
  float c1, c2;
} mo_progress_t;

/* Where step sizes go by the count of updates, it stays here. */
#define MO_STEPS_MOST 0x7FFFFFFFu

/* Returns the length, or 0 when the blob does not have the room. */
size_t mo_state_write(uint8_t *blob, size_t capacity, const uint8_t plan[16],
                      const mo_progress_t *progress, const float *payload, uint32_t bytes);

/* Checks everything about a blob and changes nothing.  `not_negative` lists {first, count} runs of
   floats in the payload that must not be negative (Adam's second moments). */
int mo_state_check(const uint8_t *blob, size_t length, const uint8_t plan[16], uint32_t bytes,
                   uint32_t accumulate, const uint32_t (*not_negative)[2], int32_t runs);

/* The count of updates in a checked blob. */
uint32_t mo_state_steps(const uint8_t *blob);

/* Copies what a checked blob holds. */
void mo_state_read(const uint8_t *blob, mo_progress_t *progress, float *payload, uint32_t bytes);

#ifdef __cplusplus
}
#endif
#endif
