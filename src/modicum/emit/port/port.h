/* What the job runner and the check ask of the machine below them: two files, text, a counter and
   the sizes of memory.  port_host.c answers with stdio, port_board.c with semihosting. */
#ifndef MO_PORT_H
#define MO_PORT_H

/* RAM that the job runner costs on a board, besides the state of the net, in bytes:
     .data   0
     .bss    8 + 4 * (MO_NET_OUTPUTS + MO_NET_TARGETS), rounded up to 8
     .arena  sizeof(mo_net_t) + 16 of guard, rounded up to 8; up to 8 before it to align it
     stack   160 when mo_net_train is called (144 on an M55 with MVE); 208 to write the trace */

#include <stddef.h>
#include <stdint.h>

/* Exit codes.  A fault on a board exits with 99 (startup.c). */
enum { PORT_OK = 0, PORT_FAILED = 1, PORT_REFUSED = 2, PORT_MISMATCH = 5 };

/* The state of the net stands in a section of its own, last in RAM.  The start-up code does not
   clear it: mo_net_init has to set all of it. */
#if defined(MO_PORT_SEMIHOST)
#define PORT_NET_SECTION __attribute__((section(".arena")))
#else
#define PORT_NET_SECTION
#endif

#define PORT_PAINT 0xA5u

/* ---- files ---- */
enum { PORT_JOB = 0, PORT_TRACE = 1 };

/* 0, or -1 when the file cannot be opened; the job is read, the trace is created */
int port_open(int file, const char *name);
/* bytes read, fewer than n only at the end of the file */
size_t port_read(int file, void *to, size_t n);
/* 0, or -1 when not all of it was written */
int port_write(int file, const void *from, size_t n);
int port_close(int file);

/* ---- text: on the host results go to stdout, complaints to stderr; a board has one stream ---- */
enum { PORT_OUT = 0, PORT_ERR = 1 };

void port_print(int stream, const char *text);
void port_print_u32(int stream, uint32_t value);
void port_print_i32(int stream, int32_t value);
/* five significant digits, as 1.2345e-06 */
void port_print_float(int stream, float value);

/* ---- measures ---- */
/* Now, in units of the machine: to be handed to port_elapsed. */
uint32_t port_ticks(void);
/* What went by since then.  Host: microseconds.  Board under -icount shift=6: instructions, modulo
   2.6 G, where the counter goes round. */
uint32_t port_elapsed(uint32_t start);

typedef struct {
  uint32_t stack_high_water, stack_size, data, bss, net;
  uint32_t peak_rss; /* of the process, in KiB; 0 on a board */
} port_memory_t;

/* on the host only peak_rss, which Linux tells: the linker gives no sizes */
port_memory_t port_memory(void);

#endif
