/* The serial line below the link: what to replace for another board.

   A driver may poll.  The host sends nothing while it waits for an answer, except the same request
   again, so bytes that are lost while the net trains cost nothing; but while a frame comes in, the
   driver has to keep up with the line: 268 bytes of buffer, or interrupts, where it cannot. */
#ifndef MO_UART_H
#define MO_UART_H

#include <stddef.h>
#include <stdint.h>

void uart_open(void);
/* The next byte, when it has come; -1 where there will be none any more. */
int uart_get(void);
void uart_send(const uint8_t *bytes, size_t n);

#endif
