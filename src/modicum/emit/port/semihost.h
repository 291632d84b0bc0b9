/* Semihosting: the emulator (or a debugger) does file and console work for the program, which asks
   by a breakpoint with the operation in r0 and the address of its arguments in r1. */
#ifndef MO_SEMIHOST_H
#define MO_SEMIHOST_H

#include <stddef.h>
#include <stdint.h>

enum { SEMIHOST_READ_BINARY = 1, SEMIHOST_WRITE_BINARY = 5 };

/* a handle, or -1 */
int32_t semihost_open(const char *name, uint32_t mode);
/* both return the bytes that were NOT moved */
size_t semihost_read(int32_t handle, void *to, size_t n);
size_t semihost_write(int32_t handle, const void *from, size_t n);
/* 0, or -1 */
int32_t semihost_close(int32_t handle);
/* to the console of the emulator (QEMU: stderr) */
void semihost_puts(const char *text);
/* the exit status of the emulator */
void semihost_exit(int code) __attribute__((noreturn));

#endif
