#!/usr/bin/env bash
# Compare an exported model's token ids and log probabilities in this environment and under transformers 4.
#
#   tools/check_export_transformers4.sh [exported_model] [environment folder]
#
# Creates a virtual environment with transformers 4 that shares torch with this one. Needs a package index.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-exported_model}
environment=${2:-${TMPDIR:-/tmp}/prmkit-transformers4}
python=${PYTHON:-python}

if [[ ! -x $environment/bin/python ]]; then
    "$python" -m venv "$environment"
    "$environment/bin/pip" install --quiet --no-deps transformers==4.55.4 tokenizers==0.21.4 huggingface-hub==0.34.4
    # Everything else comes from this environment, which is searched after the new one.
    site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/shared.pth"
fi
numbers=$(mktemp -d)
trap 'rm -rf "$numbers"' EXIT
"$python" tools/export_numbers.py "$model" "$numbers/here.json"
"$environment/bin/python" tools/export_numbers.py "$model" "$numbers/transformers4.json"
"$python" tools/export_numbers.py --compare "$numbers/here.json" "$numbers/transformers4.json"
