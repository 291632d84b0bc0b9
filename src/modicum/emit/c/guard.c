/* Checks on data that came from outside or out of a training step. */
#include "mo_kernels.h"

int mo_all_finite(const float *x, int32_t n) {
  for (int32_t i = 0; i < n; i++) {
    union {
      float value;
      uint32_t bits;
    } u;
    u.value = x[i];
    if ((u.bits & 0x7F800000u) == 0x7F800000u) return 0;
  }
  return 1;
}

/* One table entry per nibble: 64 bytes of flash, two look-ups a byte. */
uint32_t mo_crc32(uint32_t crc, const void *data, size_t n) {
  static const uint32_t table[16] = {
      0x00000000u, 0x1DB71064u, 0x3B6E20C8u, 0x26D930ACu, 0x76DC4190u, 0x6B6B51F4u,
      0x4DB26158u, 0x5005713Cu, 0xEDB88320u, 0xF00F9344u, 0xD6D6A3E8u, 0xCB61B38Cu,
      0x9B64C2B0u, 0x86D3D2D4u, 0xA00AE278u, 0xBDBDF21Cu};
  const uint8_t *p = (const uint8_t *)data;
  crc = ~crc;
  while (n-- > 0) {
    crc ^= *p++;
    crc = (crc >> 4) ^ table[crc & 15];
    crc = (crc >> 4) ^ table[crc & 15];
  }
  return ~crc;
}
