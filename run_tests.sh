#!/usr/bin/env bash
# Every check and every test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'USAGE'
Usage: ./run_tests.sh [--fast | --all] [arguments of pytest]

Installs what the tests need (requirements-dev.txt, once), then runs ruff, mypy, shellcheck and pytest.

  --fast       leave out tests that start LLaMA Factory, download or are slow (markers llamafactory, network, slow)
  --all        also run tests that install gigabytes: a real vLLM, verl, Inspect AI (marker huge); and every process
               imports its packages itself (as in tests with the marker new_processes)
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

# The tests start hundreds of Pythons, which would otherwise compile the same modules each time.
unset PYTHONDONTWRITEBYTECODE

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/shellcheck" ./*.sh .ci/run
# Three processes for two cores, because a test spends a third of its time waiting for a signal, a server or a disk. The
# tests of a file stay together, and so do their fixtures; conftest.py puts the longest files first, where pytest-xdist
# would put them last.
exec "$python" -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
