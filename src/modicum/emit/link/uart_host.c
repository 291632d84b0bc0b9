/* Standard input and output in the place of a serial line. */
#define _POSIX_C_SOURCE 200112L /* read, write */

#include "uart.h"

#include <stdlib.h>
#include <unistd.h>

static uint8_t waiting[256];
static size_t at, end;

void uart_open(void)
{
}

int uart_get(void)
{
  if (at == end) {
    const ssize_t n = read(STDIN_FILENO, waiting, sizeof waiting);
    if (n <= 0) {
      return -1;
    }
    at = 0;
    end = (size_t)n;
  }
  return waiting[at++];
}

void uart_send(const uint8_t *bytes, size_t n)
{
  while (n > 0) {
    const ssize_t sent = write(STDOUT_FILENO, bytes, n);
    if (sent <= 0) {
      exit(EXIT_FAILURE);
    }
    bytes += sent;
    n -= (size_t)sent;
  }
}
