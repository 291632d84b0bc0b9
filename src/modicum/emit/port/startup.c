/* Start-up of a Cortex-M4F, M7 or M55 (QEMU mps2-an386, mps2-an500, mps3-an547): vectors, floating
   point, a painted stack, .data and .bss, and a fault handler that says where and exits with 99. */
#include "semihost.h"

enum { FAULT_EXIT = 99 };

#define SCB_CFSR (*(volatile const uint32_t *)0xE000ED28u)
#define SCB_MMFAR (*(volatile const uint32_t *)0xE000ED34u)
#define SCB_BFAR (*(volatile const uint32_t *)0xE000ED38u)
/* which of the two address registers tells something */
#define CFSR_MMFAR (1u << 7)
#define CFSR_BFAR (1u << 15)
/* MemManage and bus fault while stacking; stack limit passed (ARMv8-M) */
#define CFSR_STACK ((1u << 4) | (1u << 12) | (1u << 20))

#define MPU_CTRL (*(volatile uint32_t *)0xE000ED94u)
#define MPU_RNR (*(volatile uint32_t *)0xE000ED98u)
#define MPU_RBAR (*(volatile uint32_t *)0xE000ED9Cu)
#define MPU_RASR (*(volatile uint32_t *)0xE000EDA0u) /* RLAR on ARMv8-M */

extern uint32_t __stack_limit[], __stack_top[], __ram_end[];
extern uint32_t __data_load[], __data_start[], __data_end[], __bss_start[], __bss_end[];

int main(int argc, char **argv);
void Reset_Handler(void);
void start(void) __attribute__((noreturn));
void fault(const uint32_t *frame) __attribute__((noreturn));

static void Fault_Handler(void);

typedef struct {
  const uint32_t *stack;
  void (*handler[15])(void);
} vectors_t;

/* Reset, NMI, HardFault, MemManage, BusFault, UsageFault, SecureFault, -, -, -, SVC, debug, -,
   PendSV, SysTick.  No interrupt is enabled, so whatever arrives is a fault. */
const vectors_t mo_vectors __attribute__((section(".vectors"), used)) = {
    __stack_top,
    {Reset_Handler, Fault_Handler, Fault_Handler, Fault_Handler, Fault_Handler, Fault_Handler,
     Fault_Handler, 0, 0, 0, Fault_Handler, Fault_Handler, 0, Fault_Handler, Fault_Handler}};

/* Nothing may touch the stack before it is painted: hence assembler. */
__attribute__((naked, noreturn)) void Reset_Handler(void)
{
  __asm volatile(
      "ldr r0, =0xE000ED88 \n" /* CPACR: full access to the FPU (and to MVE on an M55) */
      "ldr r1, [r0] \n"
      "orr r1, r1, #(0xF << 20) \n"
      "str r1, [r0] \n"
      "dsb \n"
      "isb \n"
      "ldr r0, =__stack_limit \n"
#if __ARM_ARCH >= 8
      "msr msplim, r0 \n"
#endif
      "ldr r1, =__stack_top \n"
      "ldr r2, =0xA5A5A5A5 \n"
      "1: cmp r0, r1 \n"
      "bhs 2f \n"
      "str r2, [r0], #4 \n"
      "b 1b \n"
      "2: b start \n");
}

/* The emulated machine has more RAM than the chip, and swallows writes to reserved addresses (the
   mps2 machines have such below RAM).  So the memory protection unit closes what lies around the
   chip's RAM: a stack that overflows, and a write past the end, are faults. */
static void protect_ram(void)
{
  const uint32_t end = (uint32_t)__ram_end;
#if __ARM_ARCH >= 8
  /* below RAM the stack limit register watches; above, 4 MB become read-only */
  MPU_RNR = 0;
  MPU_RBAR = end | (2u << 1) | 1u;
  MPU_RASR = ((end + 0x3FFFE0u) & ~31u) | 1u;
#else
  /* Region i of 2^(n+1) bytes, n in bits 1..5, aligned to its size, no access: 64 KB below RAM, and
     above it as much as the alignment of its end allows. */
  const uint32_t below = 65536u;
  const uint32_t above = end & (0u - end);
  MPU_RNR = 0;
  MPU_RBAR = (uint32_t)__stack_limit - below;
  MPU_RASR = (15u << 1) | 1u;
  MPU_RNR = 1;
  MPU_RBAR = end;
  MPU_RASR = ((30u - (uint32_t)__builtin_clz(above)) << 1) | 1u;
#endif
  /* on, with the default map for all else, and off inside the fault handler */
  MPU_CTRL = (1u << 2) | 1u;
  __asm volatile("dsb \n isb" ::: "memory");
}

__attribute__((used)) void start(void)
{
  protect_ram();
  const uint32_t *from = __data_load;
  for (uint32_t *to = __data_start; to < __data_end; to++) {
    *to = *from++;
  }
  for (uint32_t *to = __bss_start; to < __bss_end; to++) {
    *to = 0;
  }
  semihost_exit(main(0, 0));
}

/* The stack may be what broke, so the handler takes it from the top again. */
__attribute__((naked)) static void Fault_Handler(void)
{
  __asm volatile(
      "mrs r0, msp \n"
      "ldr r1, =__stack_top \n"
      "msr msp, r1 \n"
      "b fault \n");
}

static void print_hex(const char *name, uint32_t value)
{
  char text[10];
  for (int i = 0; i < 8; i++) {
    text[i] = "0123456789abcdef"[(value >> (28 - 4 * i)) & 15u];
  }
  text[8] = '\n';
  text[9] = '\0';
  semihost_puts(name);
  semihost_puts(text);
}

__attribute__((used)) void fault(const uint32_t *frame)
{
  const uint32_t status = SCB_CFSR;
  const int overflow = frame < __stack_limit || (status & CFSR_STACK) != 0u;
  semihost_puts(overflow ? "fault: the stack overflowed (STACK_LEN in net.mk)\n" : "fault\n");
  if (!overflow && frame + 8 <= __stack_top) {
    print_hex("  pc   ", frame[6]);
    print_hex("  lr   ", frame[5]);
  }
  print_hex("  sp   ", (uint32_t)frame);
  print_hex("  cfsr ", status);
  if ((status & (CFSR_MMFAR | CFSR_BFAR)) != 0u) {
    print_hex("  addr ", (status & CFSR_MMFAR) != 0u ? SCB_MMFAR : SCB_BFAR);
  }
  semihost_exit(FAULT_EXIT);
}
