/* The port on a Cortex-M without an operating system, under semihosting. */
#include "port.h"
#include "semihost.h"

#if !defined(MO_PORT_COUNTER) || !defined(MO_PORT_TICKS_PER_25)
#error "define the FPGAIO counter's address and its ticks per 25 instructions (see Makefile)"
#endif

/* Addresses from mcu.ld; only where they stand matters, not what is there. */
extern uint32_t __stack_limit[], __stack_top[];
extern uint32_t __data_start[], __data_end[], __bss_start[], __bss_end[];
extern uint32_t __arena_start[], __arena_end[];

static int32_t handles[2];

/* ---- semihosting ---- */

static int32_t semihost(uint32_t operation, const void *arguments)
{
  register uint32_t r0 __asm("r0") = operation;
  register const void *r1 __asm("r1") = arguments;
  __asm volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
  return (int32_t)r0;
}

int32_t semihost_open(const char *name, uint32_t mode)
{
  uint32_t length = 0;
  while (name[length] != '\0') {
    length++;
  }
  const uint32_t arguments[3] = {(uint32_t)name, mode, length};
  return semihost(0x01u, arguments);
}

int32_t semihost_close(int32_t handle)
{
  const uint32_t arguments[1] = {(uint32_t)handle};
  return semihost(0x02u, arguments);
}

void semihost_puts(const char *text)
{
  (void)semihost(0x04u, text);
}

size_t semihost_write(int32_t handle, const void *from, size_t n)
{
  const uint32_t arguments[3] = {(uint32_t)handle, (uint32_t)from, (uint32_t)n};
  return (size_t)semihost(0x05u, arguments);
}

size_t semihost_read(int32_t handle, void *to, size_t n)
{
  const uint32_t arguments[3] = {(uint32_t)handle, (uint32_t)to, (uint32_t)n};
  return (size_t)semihost(0x06u, arguments);
}

void semihost_exit(int code)
{
  /* ADP_Stopped_ApplicationExit */
  const uint32_t arguments[2] = {0x20026u, (uint32_t)code};
  for (;;) {
    (void)semihost(0x20u, arguments);
  }
}

/* ---- port.h ---- */

int port_open(int file, const char *name)
{
  handles[file] =
      semihost_open(name, file == PORT_JOB ? SEMIHOST_READ_BINARY : SEMIHOST_WRITE_BINARY);
  return handles[file] == -1 ? -1 : 0;
}

size_t port_read(int file, void *to, size_t n)
{
  size_t left = semihost_read(handles[file], to, n);
  return left > n ? 0 : n - left;
}

int port_write(int file, const void *from, size_t n)
{
  return semihost_write(handles[file], from, n) == 0 ? 0 : -1;
}

int port_close(int file)
{
  return semihost_close(handles[file]) == 0 ? 0 : -1;
}

void port_print(int stream, const char *text)
{
  (void)stream;
  semihost_puts(text);
}

uint32_t port_ticks(void)
{
  return *(volatile const uint32_t *)MO_PORT_COUNTER;
}

uint32_t port_elapsed(uint32_t start)
{
  const uint32_t ticks = port_ticks() - start;
  /* in two parts, because ticks * 25 would overflow */
  return ticks / MO_PORT_TICKS_PER_25 * 25u +
         ticks % MO_PORT_TICKS_PER_25 * 25u / MO_PORT_TICKS_PER_25;
}

static uint32_t bytes_between(const uint32_t *from, const uint32_t *to)
{
  return (uint32_t)to - (uint32_t)from;
}

port_memory_t port_memory(void)
{
  const uint32_t paint = PORT_PAINT * 0x01010101u;
  const uint32_t *deepest = __stack_limit;
  while (deepest < __stack_top && *deepest == paint) {
    deepest++;
  }
  port_memory_t memory;
  memory.stack_high_water = bytes_between(deepest, __stack_top);
  memory.stack_size = bytes_between(__stack_limit, __stack_top);
  memory.data = bytes_between(__data_start, __data_end);
  memory.bss = bytes_between(__bss_start, __bss_end);
  memory.net = bytes_between(__arena_start, __arena_end);
  memory.peak_rss = 0;
  return memory;
}
