#!/usr/bin/env bash
# Every check and every test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'USAGE'
Usage: ./run_tests.sh [--fast | --all] [arguments of pytest]

Installs what the tests need (requirements-dev.txt, once), then runs ruff, mypy, shellcheck and pytest.

  --fast       leave out what starts LLaMA Factory, downloads, or is slow (markers llamafactory, network, slow)
  --all        also what installs gigabytes: a real vLLM, verl, Inspect AI (marker huge); and every process imports
               its packages itself (as in tests with the marker new_processes)
  -h, --help   show this text

Everything else goes to pytest: ./run_tests.sh -k verdict, ./run_tests.sh tests/dataset
USAGE
}

selection=(-m "not huge")
case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
    --fast)
        selection=(-m "not llamafactory and not slow and not network and not huge")
        shift
        ;;
    --all)
        selection=()
        export PRMKIT_TESTS_PRELOADED="" # see tests/preloaded.py
        shift
        ;;
esac
python=$(./setup_environment.sh requirements-dev.txt)
bin=$(dirname "$python")

# The tests start hundreds of Pythons, which would else compile the same modules each time.
unset PYTHONDONTWRITEBYTECODE

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/shellcheck" ./*.sh .ci/run
# One process more than two cores: a third of the time a test waits, for a signal, a server or a disk. A file stays
# together, as do its fixtures; conftest.py puts the longest files first, and pytest-xdist would put them last.
exec "$python" -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
