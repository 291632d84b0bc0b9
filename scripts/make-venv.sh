#!/bin/sh
# Create the virtual environment, or say what is missing for it.
# usage: make-venv.sh PYTHON FOLDER
set -eu
python=$1 folder=$2

if ! command -v "$python" >/dev/null; then
    echo "error: no $python on this machine; modicum needs Python 3.10 or later" >&2
    echo "  try    apt-get install python3 python3-venv, or make PYTHON=/path/to/python" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $("$python" --version) is too old; modicum needs Python 3.10 or later" >&2
    echo "  try    make PYTHON=/path/to/python" >&2
    exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! "$(dirname "$0")/apt-install.sh" "python$version-venv"; then
        echo "error: $python has no venv module" >&2
        echo "  try    apt-get install python$version-venv" >&2
        exit 1
    fi
fi
"$python" -m venv --clear "$folder"
