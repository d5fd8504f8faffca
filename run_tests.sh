#!/usr/bin/env bash
# Set up what the tests need, then run every check and every test. Arguments go to pytest: ./run_tests.sh -k verdict
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=$(./setup_environment.sh requirements-dev.txt)
bin=$(dirname "$python")

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/shellcheck" ./*.sh .ci/run
# Two at once: most of a test here is waiting for imports on one core. A file keeps its order, and its fixtures.
exec "$python" -m pytest --numprocesses 2 --dist loadfile "$@"
