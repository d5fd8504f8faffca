#!/usr/bin/env bash
# Install the pinned dependencies, once.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'USAGE'
Usage: ./setup_environment.sh [requirements-dev.txt]
       ./setup_environment.sh --python      install nothing, only print the Python that is used

Installs the pinned dependencies of requirements.txt (about 6 GB) and, if given, of a second file into the active
virtual or conda environment or, without one, into .venv (created if missing). Prints the path of that Python on stdout
and progress on stderr. A second run changes nothing. Exit codes: 0 done, 1 the installation failed, 2 usage error.
USAGE
}

say() { printf '%s\n' "$*" >&2; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "error: no Python 3.11 or newer found. Install Python 3.11, then run this again."
    exit 1
}

case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
    --python) ;;
    -*)
        say "error: '$1' is not an option. See ./setup_environment.sh --help"
        exit 2
        ;;
    *)
        if [[ ! -f ${1:-$here/requirements.txt} ]]; then
            say "error: $1: no such file. Pass a requirements file, or nothing for requirements.txt alone."
            exit 2
        fi
        ;;
esac

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
        say "Creating a virtual environment in .venv with $("$python" --version)."
        "$python" -m venv "$environment" >&2
    fi
fi
python=$environment/bin/python
if ! is_new_enough "$python"; then
    say "error: $python is not Python 3.11 or newer. Create an environment with Python 3.11, or deactivate this one" \
        "and run this again."
    exit 1
fi
if [[ ${1:-} == --python ]]; then
    printf '%s\n' "$python"
    exit 0
fi

# The stamp has a checksum of what was installed, so a changed pin is noticed and an unchanged one costs nothing.
files=("$here/requirements.txt")
[[ $# == 0 || $1 -ef ${files[0]} ]] || files+=("$1")
stamp=$environment/.prmkit-$(basename "${files[-1]}")
wanted=$(cat "$here"/requirements*.txt | cksum)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    say "Dependencies are already installed ($environment)."
else
    say "Installing the pinned dependencies into $environment: about 6 GB, a few minutes the first time."
    # One line for each download, with its size, instead of several hundred from pip.
    "$python" -m pip install --disable-pip-version-check "${files[@]/#/--requirement=}" 2>&1 |
        awk '/^ *Downloading / || /^ERROR|^error/ { sub(/^ */, ""); print; fflush() }
             /^Installing collected packages/ { print "Unpacking, a minute or two ..."; fflush() }' >&2 || {
        say "error: pip could not install ${files[*]}; the reason is above. Fix it, then run this again."
        exit 1
    }
    printf '%s\n' "$wanted" >"$stamp"
    say "Dependencies are installed."
fi
printf '%s\n' "$python"
