/* The job runner: carries out the records of a job file with the net and writes what came of each
   to a trace file.  The same source runs on the host and on a board.

     main [job.bin [trace.bin]]       (a board reads job.bin and writes trace.bin where QEMU runs)

   All words are 32 bits, little-endian; floats are IEEE 754.

   job    header   'MOJB' 1 n_inputs n_targets flags n_records
          record   kind label, then by kind
            0 predict, 1 train   targets[n_targets] inputs[n_inputs]    (predict ignores targets)
            2 export state       nothing
            3 import state       length, blob padded with zeros to 4 bytes
            4 clear prototypes   nothing
            5 add to prototype   as train; the label's
            6 select             nothing; the label is the member's index
            7 clear steps        nothing
            8 attend             as train
   trace  header   'MOTR' 1 n_outputs n_trained arena_planned flags
          record   kind status loss elapsed, then by kind
            0                    logits[n_outputs], only if status is 0
            1                    trained[n_trained], only with JOB_PARAMETERS
            2                    length, blob padded with zeros to 4 bytes, only if status is 0
            3, 4, 5, 7, 8        nothing
            6                    n_trained of the member, only if status is 0
          trailer  'MOND' arena_high_water stack_high_water stack_size data bss net records status
                   peak_rss

   `elapsed` covers the call of mo_net_train, _attend, .. and about 14 instructions
   around it: on a board executed instructions, on the host microseconds.  `net` is the size of the
   net's state with the guard behind it, `records` how many were carried out, `status` the exit code,
   `peak_rss` that of the host's process in KiB.  A sample is read straight into the arena, so that no
   second copy costs RAM. */
#include "net.h"
#include "port.h"

#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the job and trace files are little-endian, and so must the machine be"
#endif

/* Moving the state needs room for a whole blob, which a board would count as RAM. */
#if !defined(MO_PORT_SEMIHOST) && !defined(MO_PORT_STATE)
#define MO_PORT_STATE
#endif

enum {
  JOB_PREDICT = 0,
  JOB_TRAIN = 1,
  JOB_EXPORT = 2,
  JOB_IMPORT = 3,
  JOB_CLEAR = 4,
  JOB_ADD = 5,
  JOB_SELECT = 6,
  JOB_CLEAR_STEPS = 7,
  JOB_ATTEND = 8
};

/* flags of a job, repeated in its trace */
#define JOB_PARAMETERS 1u /* every train record also writes all trained parameters */
#define JOB_PAINT 2u      /* paint the state before init and measure how far the arena is used */
/* flags that only a trace has */
#define TRACE_MICROSECONDS 256u /* elapsed is in microseconds, not in instructions */
#define TRACE_PARITY 512u       /* built with PARITY=1 */

#define JOB_MAGIC 0x424A4F4Du     /* MOJB */
#define TRACE_MAGIC 0x52544F4Du   /* MOTR */
#define TRAILER_MAGIC 0x444E4F4Du /* MOND */
#define FORMAT_VERSION 1u

/* What stands behind the arena shows whether a kernel wrote past its end. */
typedef struct {
  mo_net_t net;
  uint8_t guard[16];
} guarded_net_t;

static guarded_net_t guarded PORT_NET_SECTION;
static float logits[MO_NET_OUTPUTS];
#if MO_NET_TARGETS > 0
static float targets[MO_NET_TARGETS];
#endif

typedef struct {
  uint32_t magic, version, inputs, targets, flags, records;
} job_header_t;

typedef struct {
  uint32_t kind, status;
  float loss;
  uint32_t elapsed;
} trace_record_t;

static int complain(int code, const char *what)
{
  port_print(PORT_ERR, what);
  port_print(PORT_ERR, "\n");
  return code;
}

static int complain_record(int code, uint32_t record, const char *what)
{
  port_print(PORT_ERR, "job: record ");
  port_print_u32(PORT_ERR, record);
  return complain(code, what);
}

static int complain_value(const char *name, uint32_t found, uint32_t expected)
{
  port_print(PORT_ERR, "job: ");
  port_print(PORT_ERR, name);
  port_print(PORT_ERR, " is ");
  port_print_u32(PORT_ERR, found);
  port_print(PORT_ERR, ", this net has ");
  port_print_u32(PORT_ERR, expected);
  return complain(PORT_REFUSED, "");
}

static int put(const void *from, size_t n)
{
  return port_write(PORT_TRACE, from, n) == 0 ? PORT_OK
                                              : complain(PORT_FAILED, "trace: cannot write");
}

static int read_header(job_header_t *job)
{
  if (port_read(PORT_JOB, job, sizeof *job) != sizeof *job || job->magic != JOB_MAGIC) {
    return complain(PORT_REFUSED, "job: not a job file");
  }
  if (job->version != FORMAT_VERSION) {
    return complain_value("version", job->version, FORMAT_VERSION);
  }
  if (job->inputs != MO_NET_INPUTS) {
    return complain_value("n_inputs", job->inputs, MO_NET_INPUTS);
  }
  if (job->targets != MO_NET_TARGETS) {
    return complain_value("n_targets", job->targets, MO_NET_TARGETS);
  }
  if ((job->flags & ~(JOB_PARAMETERS | JOB_PAINT)) != 0u) {
    return complain(PORT_REFUSED, "job: unknown flags");
  }
  return PORT_OK;
}

static uint32_t count_trained(const mo_net_t *net)
{
  uint32_t sum = 0;
  int32_t count = 0;
  for (int32_t i = 0; mo_net_trained(net, i, &count) != NULL; i++) {
    sum += (uint32_t)count;
  }
  return sum;
}

static int write_header(uint32_t job_flags)
{
  uint32_t flags = job_flags;
#if !defined(MO_PORT_SEMIHOST)
  flags |= TRACE_MICROSECONDS;
#endif
#if defined(MO_PORT_PARITY)
  flags |= TRACE_PARITY;
#endif
  const uint32_t header[6] = {TRACE_MAGIC,  FORMAT_VERSION, MO_NET_OUTPUTS,
                              count_trained(&guarded.net), MO_NET_ARENA, flags};
  return put(header, sizeof header);
}

static int write_trained(const mo_net_t *net)
{
  int code = PORT_OK;
  int32_t count = 0;
  const float *slice;
  for (int32_t i = 0; code == PORT_OK && (slice = mo_net_trained(net, i, &count)) != NULL; i++) {
    code = put(slice, (size_t)count * sizeof *slice);
  }
  return code;
}

/* One record with a sample; its kind and label have been read. */
static int run_sample(uint32_t kind, int32_t label, uint32_t record, uint32_t flags)
{
  mo_net_t *net = &guarded.net;
  float *input = mo_net_input(net);
#if MO_NET_TARGETS > 0
  if (port_read(PORT_JOB, targets, sizeof targets) != sizeof targets) {
    return complain_record(PORT_FAILED, record, " is cut short");
  }
#endif
  if (port_read(PORT_JOB, input, MO_NET_INPUTS * sizeof *input) != MO_NET_INPUTS * sizeof *input) {
    return complain_record(PORT_FAILED, record, " is cut short");
  }

  trace_record_t result = {kind, 0, 0.0f, 0};
  int status;
  const uint32_t start = port_ticks();
  if (kind == JOB_PREDICT) {
    status = mo_net_predict(net, input, logits);
#if MO_NET_PROTOTYPES
  } else if (kind == JOB_ADD) {
    status = mo_net_prototypes_add(net, input, label);
#endif
#if MO_NET_ATTEND
  } else if (kind == JOB_ATTEND) {
#if MO_NET_TARGETS > 0
    status = mo_net_attend(net, input, targets);
#else
    status = mo_net_attend(net, input, label);
#endif
#endif
  } else {
#if MO_NET_TARGETS > 0
    (void)label;
    status = mo_net_train(net, input, targets, &result.loss);
#else
    status = mo_net_train(net, input, label, &result.loss);
#endif
  }
  result.elapsed = port_elapsed(start);
  result.status = (uint32_t)status;

  int code = put(&result, sizeof result);
  if (code == PORT_OK && kind == JOB_PREDICT && status == 0) {
    code = put(logits, sizeof logits);
  }
  if (code == PORT_OK && kind == JOB_TRAIN && (flags & JOB_PARAMETERS) != 0u) {
    code = write_trained(net);
  }
  return code;
}

#if MO_NET_PROTOTYPES
static int clear_prototypes(void)
{
  const int status = mo_net_prototypes_clear(&guarded.net);
  const trace_record_t result = {JOB_CLEAR, (uint32_t)status, 0.0f, 0};
  return put(&result, sizeof result);
}
#endif

#if defined(MO_NET_INNER_STEPS)
static int clear_steps(void)
{
  const int status = mo_net_steps_clear(&guarded.net);
  const trace_record_t result = {JOB_CLEAR_STEPS, (uint32_t)status, 0.0f, 0};
  return put(&result, sizeof result);
}
#endif

static void paint(uint32_t flags)
{
  if ((flags & JOB_PAINT) != 0u) {
    memset(&guarded, (int)PORT_PAINT, sizeof guarded);
  }
}

#if MO_NET_MEMBERS > 0
/* The arena is painted again, so that what is measured is the member's own. */
static int select_member(int32_t index, uint32_t flags)
{
  if (index >= 0 && index < MO_NET_MEMBERS) {
    paint(flags);
  }
  const int status = mo_net_select(&guarded.net, index);
  const trace_record_t result = {JOB_SELECT, (uint32_t)status, 0.0f, 0};
  const int code = put(&result, sizeof result);
  const uint32_t trained = count_trained(&guarded.net);
  return code == PORT_OK && status == 0 ? put(&trained, sizeof trained) : code;
}
#endif

#if defined(MO_PORT_STATE)
/* A little longer than a blob, so that too long a blob can be tried as well. */
static uint8_t blob[(MO_NET_STATE + 64u + 3u) / 4u * 4u];

static int export_state(void)
{
  static const uint8_t zeros[3] = {0, 0, 0};
  const size_t length = mo_net_export_state(&guarded.net, blob, sizeof blob);
  const uint32_t length_word = (uint32_t)length;
  const trace_record_t result = {JOB_EXPORT, length > 0 ? 0u : (uint32_t)-1, 0.0f, 0};
  int code = put(&result, sizeof result);
  if (length == 0 || code != PORT_OK) {
    return code;
  }
  code = put(&length_word, sizeof length_word);
  if (code == PORT_OK) {
    code = put(blob, length);
  }
  return code == PORT_OK ? put(zeros, (0u - length) & 3u) : code;
}

static int import_state(uint32_t record)
{
  uint32_t length;
  if (port_read(PORT_JOB, &length, sizeof length) != sizeof length) {
    return complain_record(PORT_FAILED, record, " is cut short");
  }
  if (length > sizeof blob) {
    return complain_record(PORT_REFUSED, record, " has too long a state");
  }
  const size_t padded = ((size_t)length + 3u) & ~(size_t)3u;
  if (port_read(PORT_JOB, blob, padded) != padded) {
    return complain_record(PORT_FAILED, record, " is cut short");
  }
  const int status = mo_net_import_state(&guarded.net, blob, length);
  const trace_record_t result = {JOB_IMPORT, (uint32_t)status, 0.0f, 0};
  return put(&result, sizeof result);
}
#endif

static int run_record(uint32_t record, uint32_t flags)
{
  uint32_t head[2];
  if (port_read(PORT_JOB, head, sizeof head) != sizeof head) {
    return complain_record(PORT_FAILED, record, " is missing");
  }
  switch (head[0]) {
#if MO_NET_PROTOTYPES
  case JOB_CLEAR:
    return clear_prototypes();
  case JOB_ADD:
#endif
#if MO_NET_ATTEND
  case JOB_ATTEND:
#endif
  case JOB_PREDICT:
  case JOB_TRAIN:
    return run_sample(head[0], (int32_t)head[1], record, flags);
#if MO_NET_MEMBERS > 0
  case JOB_SELECT:
    return select_member((int32_t)head[1], flags);
#endif
#if defined(MO_NET_INNER_STEPS)
  case JOB_CLEAR_STEPS:
    return clear_steps();
#endif
#if defined(MO_PORT_STATE)
  case JOB_EXPORT:
    return export_state();
  case JOB_IMPORT:
    return import_state(record);
#endif
  default:
    return complain_record(PORT_REFUSED, record, " is of a kind that this build does not know");
  }
}

/* The bytes of the arena up to the last one that is no longer paint; more than the arena has when
   the guard was hit. */
static uint32_t arena_high_water(void)
{
  const uint8_t *bytes = (const uint8_t *)&guarded;
  const size_t start = offsetof(guarded_net_t, net) + offsetof(mo_net_t, arena);
  size_t end = sizeof guarded;
  while (end > start && bytes[end - 1] == PORT_PAINT) {
    end--;
  }
  return (uint32_t)(end - start);
}

static int write_trailer(uint32_t flags, uint32_t records, int code)
{
  const port_memory_t memory = port_memory();
  const uint32_t high_water = (flags & JOB_PAINT) != 0u ? arena_high_water() : 0u;
  const uint32_t trailer[10] = {TRAILER_MAGIC, high_water, memory.stack_high_water,
                               memory.stack_size, memory.data, memory.bss,
                               (uint32_t)sizeof guarded, records, (uint32_t)code,
                                memory.peak_rss};
  const int written = put(trailer, sizeof trailer);
  if (code == PORT_OK && written == PORT_OK) {
    port_print(PORT_OUT, "ok: ");
    port_print_u32(PORT_OUT, records);
    port_print(PORT_OUT, " records");
    if ((flags & JOB_PAINT) != 0u) {
      port_print(PORT_OUT, ", arena ");
      port_print_u32(PORT_OUT, high_water);
      port_print(PORT_OUT, " of ");
      port_print_u32(PORT_OUT, MO_NET_ARENA);
      port_print(PORT_OUT, " bytes");
    }
    port_print(PORT_OUT, "\n");
  }
  return written;
}

static int run_job(const job_header_t *job)
{
  paint(job->flags);
  const int status = mo_net_init(&guarded.net);
  int code = write_header(job->flags);
  if (code != PORT_OK) {
    return code;
  }
  if (status != 0) {
    port_print(PORT_ERR, "net: init: ");
    code = complain(PORT_FAILED, mo_net_error(status));
  }
  uint32_t record = 0;
  while (code == PORT_OK && record < job->records) {
    code = run_record(record, job->flags);
    if (code == PORT_OK) {
      record++;
    }
  }
  uint32_t rest;
  if (code == PORT_OK && port_read(PORT_JOB, &rest, sizeof rest) != 0) {
    code = complain(PORT_REFUSED, "job: goes on after its last record");
  }
  const int written = write_trailer(job->flags, record, code);
  return code != PORT_OK ? code : written;
}

int main(int argc, char **argv)
{
  const char *job_name = argc > 1 ? argv[1] : "job.bin";
  const char *trace_name = argc > 2 ? argv[2] : "trace.bin";
  job_header_t job;

  if (port_open(PORT_JOB, job_name) != 0) {
    return complain(PORT_FAILED, "job: cannot open");
  }
  int code = read_header(&job);
  if (code == PORT_OK && port_open(PORT_TRACE, trace_name) != 0) {
    code = complain(PORT_FAILED, "trace: cannot create");
  } else if (code == PORT_OK) {
    code = run_job(&job);
    if (port_close(PORT_TRACE) != 0 && code == PORT_OK) {
      code = complain(PORT_FAILED, "trace: cannot write");
    }
  }
  (void)port_close(PORT_JOB);
  return code;
}
