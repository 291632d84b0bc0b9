#!/bin/sh
# See to it that the cross-compiler and QEMU for the emulated-board tests are there.
# Without them those tests are skipped, or, with MODICUM_REQUIRE=qemu, this fails.
set -eu

packages="gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm"

missing() {
    command -v arm-none-eabi-gcc >/dev/null || echo arm-none-eabi-gcc
    # GCC answers with a path only where newlib has put the file.
    case $(arm-none-eabi-gcc -print-file-name=nano.specs 2>/dev/null) in
    */*) ;;
    *) echo newlib ;;
    esac
    command -v qemu-system-arm >/dev/null || echo qemu-system-arm
}

[ -n "$(missing)" ] || exit 0
# shellcheck disable=SC2086
"$(dirname "$0")/apt-install.sh" $packages || true
still=$(missing | paste -sd, - | sed 's/,/, /g')
[ -n "$still" ] || exit 0

case " $(printf %s "${MODICUM_REQUIRE:-}" | tr , ' ') " in
*" qemu "*)
    echo "error: MODICUM_REQUIRE asks for qemu, and these are missing: $still" >&2
    echo "  try    apt-get install $packages" >&2
    exit 1
    ;;
esac
echo "the emulated-board tests will be skipped: missing $still (apt-get install $packages)"
