/* Arm's CMSDK UART, which QEMU's mps2 and mps3 machines have: one byte of buffer each way. */
#include "uart.h"

#if !defined(MO_UART) || !defined(MO_UART_IRQ)
#error "define the UART's address and the number of its receive interrupt (see Makefile)"
#endif

typedef struct {
  uint32_t data, state, ctrl, intstatus, bauddiv;
} cmsdk_uart_t;

#define UART ((volatile cmsdk_uart_t *)MO_UART)
#define NVIC_ISER ((volatile uint32_t *)0xE000E100u)
#define NVIC_ICPR ((volatile uint32_t *)0xE000E280u)

enum { STATE_TX_FULL = 1, STATE_RX_FULL = 2 };
enum { CTRL_TX = 1, CTRL_RX = 2, CTRL_RX_INTERRUPT = 8 };
enum { INT_RX = 2 };

/* The interrupt is only what ends the sleep: it is masked, and no handler runs. */
void uart_open(void)
{
  __asm volatile("cpsid i" ::: "memory");
  UART->bauddiv = 217; /* 25 MHz to 115200; the emulator does not pace it */
  UART->ctrl = CTRL_TX | CTRL_RX | CTRL_RX_INTERRUPT;
  NVIC_ISER[MO_UART_IRQ / 32] = 1u << (MO_UART_IRQ % 32);
}

int uart_get(void)
{
  while ((UART->state & STATE_RX_FULL) == 0u) {
    __asm volatile("wfi" ::: "memory");
  }
  UART->intstatus = INT_RX;
  NVIC_ICPR[MO_UART_IRQ / 32] = 1u << (MO_UART_IRQ % 32);
  return (int)(UART->data & 0xFFu);
}

void uart_send(const uint8_t *bytes, size_t n)
{
  for (size_t i = 0; i < n; i++) {
    while ((UART->state & STATE_TX_FULL) != 0u) {
    }
    UART->data = bytes[i];
  }
}
