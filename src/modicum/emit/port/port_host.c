/* The port on a machine with an operating system. */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */

#include "port.h"

#include <stdio.h>
#include <time.h>

static FILE *files[2];

int port_open(int file, const char *name)
{
  files[file] = fopen(name, file == PORT_JOB ? "rb" : "wb");
  return files[file] == NULL ? -1 : 0;
}

size_t port_read(int file, void *to, size_t n)
{
  return fread(to, 1, n, files[file]);
}

int port_write(int file, const void *from, size_t n)
{
  return fwrite(from, 1, n, files[file]) == n ? 0 : -1;
}

int port_close(int file)
{
  return fclose(files[file]) == 0 ? 0 : -1;
}

void port_print(int stream, const char *text)
{
  fputs(text, stream == PORT_OUT ? stdout : stderr);
}

uint32_t port_ticks(void)
{
  struct timespec now;
  if (clock_gettime(CLOCK_MONOTONIC, &now) != 0) {
    return 0;
  }
  return (uint32_t)now.tv_sec * 1000000u + (uint32_t)(now.tv_nsec / 1000);
}

uint32_t port_elapsed(uint32_t start)
{
  return port_ticks() - start;
}

port_memory_t port_memory(void)
{
  port_memory_t none = {0, 0, 0, 0, 0};
  return none;
}
