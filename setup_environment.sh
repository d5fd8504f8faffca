#!/usr/bin/env bash
# Install pinned dependencies, once. Into the active virtual environment if there is one, else into .venv.
#
#   ./setup_environment.sh [requirements.txt]
#   ./setup_environment.sh --python             install nothing, only say which Python it is
#
# Prints the path of the Python that has them on stdout, and what it does on stderr. A second run changes nothing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "error: no Python 3.11 or newer found. Install Python 3.11, then run this again."
    exit 1
}

if [[ -n ${VIRTUAL_ENV:-} ]]; then
    environment=$VIRTUAL_ENV
elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
    environment=$CONDA_PREFIX
else
    environment=$here/.venv
    if [[ ${1:-} == --python && ! -x $environment/bin/python ]]; then
        find_python
        exit 0
    fi
    if [[ ! -x $environment/bin/python ]]; then
        python=$(find_python)
        say "Making a virtual environment in .venv with $("$python" --version)."
        "$python" -m venv "$environment" >&2
    fi
fi
python=$environment/bin/python
if [[ ${1:-} == --python ]]; then
    printf '%s\n' "$python"
    exit 0
fi

# The stamp carries what was installed, so a changed pin is noticed and an unchanged one costs nothing.
requirements=$(realpath -- "${1:-$here/requirements.txt}")
stamp=$environment/.prmkit-$(basename "$requirements")
wanted=$(cat "$here"/requirements*.txt | cksum)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    say "Dependencies are there ($environment)."
else
    say "Installing the pinned dependencies into $environment (about 6 GB, a few minutes the first time)."
    "$python" -m pip install --disable-pip-version-check --quiet --requirement "$requirements" >&2 || {
        say "error: pip could not install $requirements; its message stands above. Mend that, then run this again."
        exit 1
    }
    printf '%s\n' "$wanted" >"$stamp"
    say "Dependencies are installed."
fi
printf '%s\n' "$python"
