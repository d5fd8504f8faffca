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
exec "$python" -m pytest "$@"
