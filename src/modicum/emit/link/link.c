#include "link.h"

#include "link_config.h"
#include "mo_kernels.h"

#include <string.h>

#if MO_NET_MEMBERS > 0 || MO_NET_PROTOTYPES > 0 || MO_NET_ATTEND > 0
#error "the link has no candidate sets, prototypes or channel attention"
#endif

#define HEAD 8u /* bytes before the payload */
#define CRC 4u
#define SAMPLE ((uint32_t)MO_NET_INPUTS + (uint32_t)MO_NET_TARGETS)
#define PAINT 0xA5u

/* NONE no net; FRESH the initial weights; HALF some are overwritten; READY the task is under way */
enum { TASK_NONE, TASK_FRESH, TASK_HALF, TASK_READY };

static const uint8_t plan_hash[16] = MO_LINK_PLAN;
static const uint8_t is_private[MO_LINK_SLICES] = MO_LINK_PRIVATE;

static void put(mo_link_t *l, uint8_t byte);
static void obey(mo_link_t *l);

void mo_link_init(mo_link_t *l, mo_net_t *net, const mo_link_board_t *board)
{
  memset(l, 0, sizeof *l);
  memset(net, PAINT, sizeof *net);
  l->net = net;
  l->board = board;
}

/* COBS: a code says how many bytes follow up to the next one, and that a 0 stood there, unless it
   is 255 or the frame ends. */
void mo_link_receive(mo_link_t *l, uint8_t byte)
{
  if (byte != 0u) {
    if (l->left > 0u) {
      l->left--;
      put(l, byte);
      return;
    }
    if (l->zero) {
      put(l, 0);
    }
    l->left = (uint8_t)(byte - 1u);
    l->zero = byte != 255u;
    return;
  }
  const uint32_t n = l->received;
  const uint8_t *const bytes = (const uint8_t *)&l->request;
  uint32_t crc;
  if (l->left == 0u && !l->spoilt && n >= HEAD + CRC) {
    memcpy(&crc, bytes + n - CRC, CRC);
    if (mo_crc32(0, bytes, n - CRC) == crc) {
      obey(l);
    } else {
      l->damaged++;
    }
  } else if (n > 0u) {
    l->damaged++;
  }
  l->received = 0;
  l->left = l->zero = l->spoilt = 0;
}

static void put(mo_link_t *l, uint8_t byte)
{
  if (l->received == sizeof l->request) {
    l->spoilt = 1;
    return;
  }
  ((uint8_t *)&l->request)[l->received++] = byte;
}

/* ---- requests ---- */

static void send_frame(const mo_link_t *l, mo_link_frame_t *frame, uint32_t payload);
static int work(mo_link_t *l, uint32_t words);
static const char *reason(int status);

static void obey(mo_link_t *l)
{
  mo_link_frame_t *const r = &l->request;
  const uint32_t payload = l->received - HEAD - CRC;
  if (r->kind >= MO_LINK_ANSWER) {
    return; /* an echo of its own */
  }
  if (r->session == 0u || (r->session != l->answer.session && r->kind != MO_LINK_HELLO)) {
    /* in its own frame: `answer` belongs to the session that there is */
    r->kind = (uint8_t)(r->kind + MO_LINK_ANSWER);
    r->status = MO_LINK_E_SESSION;
    send_frame(l, r, 0);
    return;
  }
  if (r->session != l->answer.session) {
    l->task = TASK_NONE;
  } else {
    const uint16_t ahead = (uint16_t)(r->sequence - l->answer.sequence);
    if (ahead == 0u) {
      l->repeated++;
      send_frame(l, &l->answer, l->answered);
    }
    if (ahead == 0u || ahead >= 0x8000u) {
      return;
    }
  }
  l->answer.session = r->session;
  l->answer.sequence = r->sequence;
  l->answer.kind = (uint8_t)(r->kind + MO_LINK_ANSWER);
  l->answered = 0;
  const int status = payload % 4u == 0u ? work(l, payload / 4u) : MO_LINK_E_LENGTH;
  if (r->kind != MO_LINK_SAMPLE || status != MO_OK) {
    l->filled = 0;
  }
  l->answer.status = (uint8_t)(status < 0 ? -status : status);
  if (status != MO_OK) {
    const char *const text = reason(status);
    l->answered = (uint32_t)strlen(text);
    memcpy(l->answer.payload.byte, text, l->answered);
  }
  send_frame(l, &l->answer, l->answered);
}

static void send_frame(const mo_link_t *l, mo_link_frame_t *frame, uint32_t payload)
{
  static const uint8_t mark = 0;
  uint8_t *const bytes = (uint8_t *)frame;
  const uint32_t crc = mo_crc32(0, bytes, HEAD + payload);
  memcpy(bytes + HEAD + payload, &crc, CRC);
  const uint32_t n = HEAD + payload + CRC;
  uint32_t at = 0;
  l->board->send(&mark, 1);
  for (;;) {
    uint32_t run = 0;
    while (run < 254u && at + run < n && bytes[at + run] != 0u) {
      run++;
    }
    const uint8_t code = (uint8_t)(run + 1u);
    l->board->send(&code, 1);
    l->board->send(bytes + at, run);
    at += run;
    if (at == n) {
      break;
    }
    at += run < 254u ? 1u : 0u; /* the 0 that the code stands for */
  }
  l->board->send(&mark, 1);
}

static const char *reason(int status)
{
  switch (status) {
  case MO_LINK_E_KIND: return "there is no such request";
  case MO_LINK_E_LENGTH: return "the request has the wrong length";
  case MO_LINK_E_TASK: return "not in this state of the task";
  case MO_LINK_E_SLICE: return "there is no such slice, or not so many values in it";
  case MO_LINK_E_PRIVATE: return "the slice is private: it does not leave the board";
  case MO_LINK_E_VALUE: return "the values are not finite; nothing was written";
  case MO_LINK_E_COMMIT: return "the weights are not those that were sent";
  case MO_LINK_E_SAMPLE: return "the sample is not whole";
  case MO_LINK_E_SENSOR: return "there is no sensor, or it gives no sample now";
  default: return mo_net_error(status);
  }
}

static int on_hello(mo_link_t *l, uint32_t n);
static int on_slice(mo_link_t *l, uint32_t n);
static int on_begin(mo_link_t *l, uint32_t n);
static int on_write(mo_link_t *l, uint32_t n);
static int on_commit(mo_link_t *l, uint32_t n);
static int on_sample(mo_link_t *l, uint32_t n);
static int on_learn(mo_link_t *l, uint32_t n);
static int on_predict(mo_link_t *l, uint32_t n);
static int on_output(mo_link_t *l, uint32_t n);
static int on_read(mo_link_t *l, uint32_t n);
static int on_stats(mo_link_t *l, uint32_t n);
static int on_learn_own(mo_link_t *l, uint32_t n);

/* n words of payload; fills the payload of the answer and says how many bytes of it. */
static int work(mo_link_t *l, uint32_t n)
{
  switch (l->request.kind) {
  case MO_LINK_HELLO: return on_hello(l, n);
  case MO_LINK_SLICE: return on_slice(l, n);
  case MO_LINK_BEGIN: return on_begin(l, n);
  case MO_LINK_WRITE: return on_write(l, n);
  case MO_LINK_COMMIT: return on_commit(l, n);
  case MO_LINK_SAMPLE: return on_sample(l, n);
  case MO_LINK_LEARN: return on_learn(l, n);
  case MO_LINK_PREDICT: return on_predict(l, n);
  case MO_LINK_OUTPUT: return on_output(l, n);
  case MO_LINK_READ: return on_read(l, n);
  case MO_LINK_STATS: return on_stats(l, n);
  case MO_LINK_LEARN_OWN: return on_learn_own(l, n);
  default: return MO_LINK_E_KIND;
  }
}

static int on_hello(mo_link_t *l, uint32_t n)
{
  uint32_t *const out = l->answer.payload.word;
  if (n != 0u) {
    return MO_LINK_E_LENGTH;
  }
  out[0] = MO_LINK_VERSION;
  memcpy(out + 1, plan_hash, sizeof plan_hash);
  out[5] = MO_NET_INPUTS;
  out[6] = MO_NET_OUTPUTS;
  out[7] = MO_NET_TARGETS;
  out[8] = MO_LINK_ACCUMULATE;
  out[9] = MO_LINK_SLICES;
  out[10] = l->board->sample != NULL ? 1u : 0u;
#if defined(MO_PORT_PARITY)
  out[10] |= 2u;
#endif
  l->answered = 11u * 4u;
  return MO_OK;
}

/* ---- weights ---- */

/* The address of a slice by an index below MO_LINK_SLICES; the net itself gives it as const. */
static float *slice(const mo_link_t *l, uint32_t index, uint32_t *count)
{
  int32_t n;
  const float *const start = mo_net_trained(l->net, (int32_t)index, &n);
  *count = (uint32_t)n;
  return l->net->arena + (start - l->net->arena);
}

/* So many values of a slice that the gateway may touch. */
static int find(const mo_link_t *l, uint32_t index, uint32_t offset, uint32_t count, float **at)
{
  uint32_t there;
  if (index >= MO_LINK_SLICES) {
    return MO_LINK_E_SLICE;
  }
  if (is_private[index]) {
    return MO_LINK_E_PRIVATE;
  }
  *at = slice(l, index, &there);
  if (offset > there || count > there - offset) {
    return MO_LINK_E_SLICE;
  }
  *at += offset;
  return MO_OK;
}

static int on_slice(mo_link_t *l, uint32_t n)
{
  const uint32_t index = l->request.payload.word[0];
  if (n != 1u) {
    return MO_LINK_E_LENGTH;
  }
  if (index >= MO_LINK_SLICES) {
    return MO_LINK_E_SLICE;
  }
  (void)slice(l, index, &l->answer.payload.word[0]);
  l->answer.payload.word[1] = is_private[index];
  l->answered = 2u * 4u;
  return MO_OK;
}

static int on_begin(mo_link_t *l, uint32_t n)
{
  if (n != 0u) {
    return MO_LINK_E_LENGTH;
  }
  l->task = TASK_FRESH;
  return mo_net_init(l->net);
}

static int on_write(mo_link_t *l, uint32_t n)
{
  const uint32_t *const word = l->request.payload.word;
  const float *const values = l->request.payload.value + 2;
  float *at;
  if (n < 3u) {
    return MO_LINK_E_LENGTH;
  }
  if (l->task != TASK_FRESH && l->task != TASK_HALF) {
    return MO_LINK_E_TASK;
  }
  const int status = find(l, word[0], word[1], n - 2u, &at);
  if (status != MO_OK) {
    return status;
  }
  if (!mo_all_finite(values, (int32_t)(n - 2u))) {
    return MO_LINK_E_VALUE;
  }
  l->task = TASK_HALF;
  memcpy(at, values, 4u * (size_t)(n - 2u));
  return MO_OK;
}

static int on_commit(mo_link_t *l, uint32_t n)
{
  if (n != 1u) {
    return MO_LINK_E_LENGTH;
  }
  if (l->task != TASK_FRESH && l->task != TASK_HALF) {
    return MO_LINK_E_TASK;
  }
  uint32_t crc = 0;
  for (uint32_t i = 0; i < MO_LINK_SLICES; i++) {
    if (!is_private[i]) {
      uint32_t count;
      const float *const start = slice(l, i, &count);
      crc = mo_crc32(crc, start, 4u * (size_t)count);
    }
  }
  if (crc != l->request.payload.word[0]) {
    return MO_LINK_E_COMMIT;
  }
  l->task = TASK_READY;
  return MO_OK;
}

static int is_whole(const mo_link_t *l)
{
  return l->task == TASK_FRESH || l->task == TASK_READY;
}

static int on_read(mo_link_t *l, uint32_t n)
{
  const uint32_t *const word = l->request.payload.word;
  float *at;
  if (n != 3u || word[2] > MO_LINK_WORDS) {
    return MO_LINK_E_LENGTH;
  }
  if (!is_whole(l)) {
    return MO_LINK_E_TASK;
  }
  const int status = find(l, word[0], word[1], word[2], &at);
  if (status == MO_OK) {
    l->answered = 4u * word[2];
    memcpy(l->answer.payload.byte, at, l->answered);
  }
  return status;
}

/* ---- samples ---- */

/* The next n floats of the row of inputs and targets. */
static int append(mo_link_t *l, const float *values, uint32_t n)
{
  if (!is_whole(l)) {
    return MO_LINK_E_TASK;
  }
  if (n > SAMPLE - l->filled) {
    return MO_LINK_E_SAMPLE;
  }
  float *const x = mo_net_input(l->net);
  for (uint32_t i = 0; i < n; i++, l->filled++) {
    if (l->filled < MO_NET_INPUTS) {
      x[l->filled] = values[i];
    } else {
      l->targets[l->filled - MO_NET_INPUTS] = values[i];
    }
  }
  return MO_OK;
}

static int on_sample(mo_link_t *l, uint32_t n)
{
  if (n < 2u) {
    return MO_LINK_E_LENGTH;
  }
  const uint32_t offset = l->request.payload.word[0];
  if (offset == 0u) {
    l->filled = 0;
  }
  return offset == l->filled ? append(l, l->request.payload.value + 1, n - 1u) : MO_LINK_E_SAMPLE;
}

static int learn(mo_link_t *l, int32_t label, float *loss)
{
  const uint32_t start = l->board->now();
#if MO_NET_TARGETS > 0
  (void)label;
  const int status = mo_net_train(l->net, mo_net_input(l->net), l->targets, loss);
#else
  const int status = mo_net_train(l->net, mo_net_input(l->net), label, loss);
#endif
  l->learn = l->board->elapsed(start);
  l->task = TASK_READY;
  return status;
}

static int on_learn(mo_link_t *l, uint32_t n)
{
  const uint32_t labels = MO_NET_TARGETS > 0 ? 0u : 1u;
  int32_t label = 0;
  if (n < labels) {
    return MO_LINK_E_LENGTH;
  }
  memcpy(&label, l->request.payload.word, 4u * (size_t)labels);
  int status = append(l, l->request.payload.value + labels, n - labels);
  if (status == MO_OK && l->filled != SAMPLE) {
    status = MO_LINK_E_SAMPLE;
  }
  if (status == MO_OK) {
    status = learn(l, label, &l->answer.payload.value[0]);
    l->answered = 4u;
  }
  return status;
}

static int on_learn_own(mo_link_t *l, uint32_t n)
{
  if (n != 1u) {
    return MO_LINK_E_LENGTH;
  }
  if (!is_whole(l)) {
    return MO_LINK_E_TASK;
  }
  const uint32_t wanted = l->request.payload.word[0];
  float sum = 0.0f;
  uint32_t taken = 0;
  while (taken < wanted) {
    float loss;
    int32_t label = 0;
    if (l->board->sample == NULL ||
        l->board->sample(mo_net_input(l->net), l->targets, &label) != 0) {
      break;
    }
    const int status = learn(l, label, &loss);
    if (status != MO_OK) {
      return status;
    }
    sum += loss;
    taken++;
  }
  if (taken == 0u) {
    return MO_LINK_E_SENSOR;
  }
  l->answer.payload.word[0] = taken;
  l->answer.payload.value[1] = sum / (float)taken;
  l->answered = 2u * 4u;
  return MO_OK;
}

static void answer_outputs(mo_link_t *l, uint32_t offset)
{
  const uint32_t left = MO_NET_OUTPUTS - offset;
  l->answered = 4u * (left < MO_LINK_WORDS ? left : MO_LINK_WORDS);
  memcpy(l->answer.payload.byte, l->outputs + offset, l->answered);
}

static int on_predict(mo_link_t *l, uint32_t n)
{
  int status = append(l, l->request.payload.value, n);
  if (status == MO_OK && l->filled != MO_NET_INPUTS) {
    status = MO_LINK_E_SAMPLE;
  }
  if (status == MO_OK) {
    const uint32_t start = l->board->now();
    status = mo_net_predict(l->net, mo_net_input(l->net), l->outputs);
    l->predict = l->board->elapsed(start);
    answer_outputs(l, 0);
  }
  return status;
}

static int on_output(mo_link_t *l, uint32_t n)
{
  const uint32_t offset = l->request.payload.word[0];
  if (n != 1u || offset >= MO_NET_OUTPUTS) {
    return MO_LINK_E_LENGTH;
  }
  answer_outputs(l, offset);
  return MO_OK;
}

/* ---- figures ---- */

static uint32_t arena_high_water(const mo_net_t *net)
{
  const uint8_t *const bytes = (const uint8_t *)net->arena;
  uint32_t n = MO_NET_ARENA;
  while (n > 0u && bytes[n - 1u] == PAINT) {
    n--;
  }
  return n;
}

static int on_stats(mo_link_t *l, uint32_t n)
{
  mo_link_stats_t stats;
  if (n != 0u) {
    return MO_LINK_E_LENGTH;
  }
  memset(&stats, 0, sizeof stats);
  l->board->memory(&stats);
  stats.net = sizeof *l->net;
  stats.arena_high_water = arena_high_water(l->net);
  stats.link = sizeof *l;
  stats.learn = l->learn;
  stats.predict = l->predict;
  stats.damaged = l->damaged;
  stats.repeated = l->repeated;
  memcpy(l->answer.payload.byte, &stats, sizeof stats);
  l->answered = sizeof stats;
  return MO_OK;
}
