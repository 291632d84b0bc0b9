/* The link: a gateway (the host: a Pi, a PC) drives the training of a board over a serial line.
   Independent of the line: bytes come in through mo_link_receive and go out through a hook.

   Frame    before stuffing, little-endian, at most 268 bytes:

              session u32 | sequence u16 | kind u8 | status u8 | payload, 0 to 256 bytes | CRC-32

            On the wire byte-stuffed (COBS: no byte of it is 0) with a 0 before and behind, so that
            both sides find the next frame after any garbage.  The CRC is mo_crc32 of all before it;
            a frame whose CRC is wrong is as if it had never come.

   Request  The host is master, and has one request on its way at a time.  It repeats a request that
            is not answered in time, unchanged.  An answer carries the session and sequence of its
            request, its kind + 128 (so that an echo is no answer), and status 0, or why not, with
            the reason as text in the payload.

            `sequence` goes up by one with each request.  The board keeps its last answer: to the
            same sequence it sends it again and does nothing twice; an older one it ignores.

            `session` is a number other than 0, drawn by the host, that HELLO brings to the board.
            A board that restarted has none and refuses every other request (MO_LINK_E_SESSION): so
            the host learns that the task is lost.  A new session begins without a task.

      kind            payload of the request       of the answer
    1 HELLO           -                            version, plan hash (4 words), inputs,
                                                   outputs, targets, accumulate, slices,
                                                   flags: 1 sensor, 2 parity build
    2 SLICE           index                        floats in it, private
    3 BEGIN           -                            -
    4 WRITE           index, offset, values        -
    5 COMMIT          CRC-32                       -
    6 SAMPLE          offset, values               -
    7 LEARN           [label], rest of the sample  loss
    8 PREDICT         rest of the sample           outputs, the first 64
    9 OUTPUT          offset                       outputs of the last PREDICT, 64 from there
   10 READ            index, offset, count         values
   11 STATS           -                            mo_link_stats_t
   12 LEARN_OWN       count                        samples learned, mean loss

            All are words of 32 bits; values, outputs and losses are floats.

   Task     BEGIN sets the initial weights, with nothing learned.  WRITE overwrites trained slices.
            From the first one on LEARN, PREDICT and READ are refused until COMMIT, whose CRC is
            over all slices that are not private, in their order, as they then stand in the arena:
            training never starts from half a state.  Once a sample was learned, or after COMMIT,
            only BEGIN makes room for WRITE.

   Sample   its inputs, then for mse its targets, as one row of floats.  SAMPLE brings it piece by
            piece, in order; the last piece travels with LEARN or PREDICT itself, so that a small
            sample is one frame.  Any other request in between but SAMPLE begins it anew.

   Private  slices that link_config.h names are neither read nor written: what a client keeps for
            itself does not leave the board, whatever the gateway asks for. */
#ifndef MO_LINK_H
#define MO_LINK_H

#include "net.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the link is little-endian, and so must the machine be"
#endif

#define MO_LINK_VERSION 1u
#define MO_LINK_WORDS 64u   /* of the longest payload */
#define MO_LINK_ANSWER 128u /* added to the kind of a request */

enum {
  MO_LINK_HELLO = 1,
  MO_LINK_SLICE = 2,
  MO_LINK_BEGIN = 3,
  MO_LINK_WRITE = 4,
  MO_LINK_COMMIT = 5,
  MO_LINK_SAMPLE = 6,
  MO_LINK_LEARN = 7,
  MO_LINK_PREDICT = 8,
  MO_LINK_OUTPUT = 9,
  MO_LINK_READ = 10,
  MO_LINK_STATS = 11,
  MO_LINK_LEARN_OWN = 12
};

/* Status of an answer: 1 to 63 is a status of the net with its sign turned (mo_state.h). */
enum {
  MO_LINK_E_SESSION = 64, /* not the session of this board: it restarted, or another host came */
  MO_LINK_E_KIND = 65,    /* no such request */
  MO_LINK_E_LENGTH = 66,  /* a payload of another length than the request has */
  MO_LINK_E_TASK = 67,    /* no task, or its weights are half written, or it is under way */
  MO_LINK_E_SLICE = 68,   /* no such slice, or not so many values in it */
  MO_LINK_E_PRIVATE = 69, /* the slice stays on the board */
  MO_LINK_E_VALUE = 70,   /* values that are not finite; nothing was written */
  MO_LINK_E_COMMIT = 71,  /* the weights are not those that the CRC was made of */
  MO_LINK_E_SAMPLE = 72,  /* pieces of a sample that do not join, or do not make a whole one */
  MO_LINK_E_SENSOR = 73   /* the firmware has no sensor, or it gives no sample now */
};

typedef struct {
  /* bytes: the net's struct and the used part of its arena; the others, `bss` without the net */
  uint32_t net, arena_high_water, data, bss, stack_size, stack_high_water;
  uint32_t link;              /* bytes of `bss` that are the link's */
  uint32_t learn, predict;    /* instructions of the last one; microseconds on the host */
  uint32_t damaged, repeated; /* frames since the start */
} mo_link_stats_t;

/* What the link asks of the board. */
typedef struct {
  void (*send)(const uint8_t *bytes, size_t n);
  /* Now, and what went by since then, for STATS. */
  uint32_t (*now)(void);
  uint32_t (*elapsed)(uint32_t start);
  /* Fills data, bss, stack_size and stack_high_water. */
  void (*memory)(mo_link_stats_t *stats);
  /* A sample of the board's own for LEARN_OWN, or NULL: writes the inputs to x, and the target
     values, or the label.  Returns 0, or something else where there is no sample now. */
  int (*sample)(float *x, float *target, int32_t *label);
} mo_link_board_t;

typedef struct {
  uint32_t session;
  uint16_t sequence;
  uint8_t kind, status;
  union {
    uint32_t word[MO_LINK_WORDS];
    float value[MO_LINK_WORDS];
    uint8_t byte[4u * MO_LINK_WORDS];
  } payload;
  uint32_t crc; /* room for it behind the longest payload; it stands right behind the real one */
} mo_link_frame_t;

/* All state of the link, apart from the net. */
typedef struct {
  mo_net_t *net;
  const mo_link_board_t *board;
  mo_link_frame_t request, answer;
  uint32_t received;    /* bytes of `request` so far */
  uint32_t answered;    /* bytes of the payload of `answer` */
  uint8_t left, zero;   /* unstuffing: bytes up to the next code; whether a 0 is due before it */
  uint8_t spoilt, task; /* too long to be a frame; see link.c */
  uint32_t filled;      /* floats of the sample that have come */
  uint32_t learn, predict, damaged, repeated;
  float outputs[MO_NET_OUTPUTS];
  float targets[MO_NET_TARGETS > 0 ? MO_NET_TARGETS : 1];
} mo_link_t;

/* Once, before the first byte. */
void mo_link_init(mo_link_t *l, mo_net_t *net, const mo_link_board_t *board);

/* A byte from the line.  With the last one of a request it does the work and sends the answer. */
void mo_link_receive(mo_link_t *l, uint8_t byte);

#endif
