#!/usr/bin/env bash
# Measure on a GPU, in about 8 minutes: training against the settings that prmkit began with, memory against the
# estimate, scoring against generating, agreement in bf16, and the demo's real model. Needs no network: missing packages
# are installed from wheels.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: benchmarks/gpu.sh [options]

  --dry-run          small sizes on the CPU, to check that everything is there and every part runs
  --wheels FOLDER    install these into a new environment on top of python3's packages, without a network
  --smollm2 FOLDER   a model folder from python -m tools.demo.smollm2; without it, the last two parts are left out
  --scratch FOLDER   for the random model of 15 GB (default: benchmarks/scratch); fastest in memory: /dev/shm/prmkit
  --output FOLDER    where results.jsonl and the logs go (default: gpu in the scratch folder)
  --parts "A B …"    only these (default: check prepare guide packed batched fastest scoring serving smollm2;
                     there are also prmkit single unchecked compiled parity)
  -h, --help         this text

Each part runs alone and has a time limit; one that fails or overruns does not affect the results of the others. Exit
code: 0 if every part succeeded, otherwise 1.
EOF
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3} size=7b device=cuda wheels="" smollm2="" output="" steps=0
scratch=$here/benchmarks/scratch
parts="check prepare guide packed batched fastest scoring serving smollm2"
while (($#)); do
    case $1 in
        --dry-run) size=tiny device=cpu steps=2 ;;
        --wheels | --smollm2 | --scratch | --output | --parts)
            (($# > 1)) || fail "$1 needs a value."
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "'$1' is not an option." ;;
    esac
    shift
done
output=${output:-$scratch/gpu}
mkdir -p "$scratch" "$output"
export PRMKIT_SCRATCH=$scratch PYTHONUNBUFFERED=1 LLAMAFACTORY_VERBOSITY=WARN
: >"$output/results.jsonl"

if [[ -n $wheels ]]; then
    environment=$scratch/environment
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -m venv --without-pip "$environment"
    # The packages of python3 come after those of the wheels on the path.
    echo "$packages" >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    "$python" -m pip --python "$environment/bin/python" install -q --no-index --no-deps --no-compile --no-cache-dir \
        "$wheels"/*.whl
    python=$environment/bin/python
fi

# The name of a part, its time limit in seconds and its arguments.
failed=""
part() {
    local name=$1 limit=$2
    shift 2
    [[ " $parts " == *" $name "* ]] || return 0
    timeout --kill-after=5 "$limit" "$python" "$here/benchmarks/gpu.py" "$@" --size "$size" --device "$device" \
        --output "$output" 2>"$output/$name.log" >&2 || failed+=" $name"
    grep -E "^[a-z0-9]+: " "$output/$name.log" || tail -n 5 "$output/$name.log"
}

part check 60 check ${smollm2:+--smollm2 "$smollm2"}
part prepare 90 prepare
for way in guide prmkit single unchecked packed batched fastest compiled; do
    part "$way" 150 training --way "$way"
done
part scoring 110 scoring
part parity 60 parity
if [[ -n $smollm2 ]]; then
    part serving 240 serving --smollm2 "$smollm2" --max-steps "$steps"
    part smollm2 240 smollm2 --smollm2 "$smollm2" --max-steps "$steps"
fi
"$python" "$here/benchmarks/gpu.py" table --output "$output"
[[ -z $failed ]] || {
    printf 'failed:%s (logs in %s)\n' "$failed" "$output" >&2
    exit 1
}
