/* A firmware that trains for a gateway: the link over the serial line of uart.h.

   On a board of your own, this file, uart_*.c and the port are what you replace; link.c stays. */
#include "link.h"
#include "port.h"
#include "uart.h"

static mo_net_t net PORT_NET_SECTION;
static mo_link_t gateway;

static void memory(mo_link_stats_t *stats)
{
  const port_memory_t m = port_memory();
  stats->data = m.data;
  stats->bss = m.bss;
  stats->stack_size = m.stack_size;
  stats->stack_high_water = m.stack_high_water;
}

/* NULL, unless a source file of yours defines it: see `sample` in link.h. */
int mo_link_sample(float *x, float *target, int32_t *label) __attribute__((weak));

static const mo_link_board_t board = {uart_send, port_ticks, port_elapsed, memory, mo_link_sample};

int main(void)
{
  mo_link_init(&gateway, &net, &board);
  uart_open();
  for (int byte = uart_get(); byte >= 0; byte = uart_get()) {
    mo_link_receive(&gateway, (uint8_t)byte);
  }
  return PORT_OK;
}
