#!/bin/sh
# Runs the job runner of a built board in the folder that holds job.bin, and leaves trace.bin there:
#   port/qemu.sh m4f|m7|m55 build/m4f-parity/main.elf [folder with job.bin]
# The exit status is that of the program: 0 ok, 1 failed, 2 the job does not fit, 99 a fault.
# The run is the same every time: 64 ns of virtual time per instruction, nothing else moves it.
set -eu
usage="usage: qemu.sh m4f|m7|m55 image.elf [folder with job.bin]"
case ${1:?$usage} in
  m4f) machine=mps2-an386 ;;
  m7) machine=mps2-an500 ;;
  m55) machine=mps3-an547 ;;
  *) echo "$usage" >&2; exit 2 ;;
esac
image=$(cd "$(dirname "${2:?$usage}")" && pwd)/$(basename "$2")
cd "${3:-.}"
exec "${QEMU:-qemu-system-arm}" -M "$machine" -display none -monitor none -serial none \
  -icount shift=6,sleep=off -semihosting-config enable=on,target=native -kernel "$image"
