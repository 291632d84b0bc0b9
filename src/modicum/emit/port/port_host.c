/* The port on a machine with an operating system. */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */

#include "port.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

/* VmHWM is the high-water mark of this program alone; getrusage would count the process that
   started it as well. */
static uint32_t peak_rss_kib(void)
{
  char line[128];
  unsigned long kib = 0;
  FILE *status = fopen("/proc/self/status", "r");
  while (status != NULL && fgets(line, sizeof line, status) != NULL) {
    if (strncmp(line, "VmHWM:", 6) == 0) {
      kib = strtoul(line + 6, NULL, 10);
    }
  }
  if (status != NULL) {
    (void)fclose(status);
  }
  return (uint32_t)kib;
}

port_memory_t port_memory(void)
{
  port_memory_t memory = {0, 0, 0, 0, 0, 0};
  memory.peak_rss = peak_rss_kib();
  return memory;
}
