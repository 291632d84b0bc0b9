/* Numbers as text without printf, which would bring a heap and kilobytes of code to a board. */
#include "port.h"

void port_print_u32(int stream, uint32_t value)
{
  char digits[11];
  char *p = digits + sizeof digits - 1;
  *p = '\0';
  do {
    *--p = (char)('0' + value % 10u);
    value /= 10u;
  } while (value != 0u);
  port_print(stream, p);
}

void port_print_i32(int stream, int32_t value)
{
  if (value < 0) {
    port_print(stream, "-");
    port_print_u32(stream, 0u - (uint32_t)value);
  } else {
    port_print_u32(stream, (uint32_t)value);
  }
}

void port_print_float(int stream, float value)
{
  if (value != value) {
    port_print(stream, "nan");
    return;
  }
  if (value < 0.0f) {
    port_print(stream, "-");
    value = -value;
  }
  if (value > 3.4028234e38f) {
    port_print(stream, "inf");
    return;
  }
  int32_t exponent = 0;
  if (value > 0.0f) {
    while (value >= 10.0f) {
      value /= 10.0f;
      exponent++;
    }
    while (value < 1.0f) {
      value *= 10.0f;
      exponent--;
    }
  }
  uint32_t scaled = (uint32_t)(value * 10000.0f + 0.5f);
  if (scaled >= 100000u) {
    scaled /= 10u;
    exponent++;
  }
  char mantissa[7];
  for (int i = 6; i > 0; i--) {
    if (i == 6) {
      mantissa[i] = '\0';
    } else if (i == 1) {
      mantissa[i] = '.';
    } else {
      mantissa[i] = (char)('0' + scaled % 10u);
      scaled /= 10u;
    }
  }
  mantissa[0] = (char)('0' + scaled);
  port_print(stream, mantissa);
  port_print(stream, "e");
  port_print_i32(stream, exponent);
}
