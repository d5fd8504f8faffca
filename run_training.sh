#!/usr/bin/env bash
# From finetune.jsonl to a judge: convert, train, and, when asked, evaluate and export. Decides nothing itself.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: ./run_training.sh [options] [key=value ...]

  -c,  --config FILE          the configuration (default: training_config.yaml)
  -d,  --dataset NAME         the variant to train on, such as reward_model_full
  -e,  --epochs N             passes over the data
  -lr, --learning-rate X
  -bs, --batch-size N         rows a device and step
       key=value              any key of LLaMA Factory, such as lora_rank=32
       --export               merge the adapter into the base model when it is trained
       --evaluate             measure the judge on held-out rows when it is trained
       --validate-only        convert and check everything, but do not train
       --no-convert           use the data that was converted before
       --overwrite            move an earlier run of the same name aside and begin anew
       --force                train although the checks found errors
       --verbose              show everything that LLaMA Factory prints
       --install-deps         install the pinned dependencies; with no other option, stop there
       --demo                 the whole job on the sample with a tiny model, on a CPU, below demo/
  -h,  --help                 this text

Exit codes: 0 done, 1 data wrong, 2 command or configuration wrong, 3 LLaMA Factory failed, 4 a threshold not met,
130 or 143 interrupted. Run the same command again to go on where it stopped.
EOF
}

refuse() {
    printf 'error: %s\n\n' "$1" >&2
    usage >&2
    exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
config="" convert=yes demo="" install=""
training=()    # what is passed on to train.py
assignments=() # and to convert_dataset.py as well
arguments=$#
while (($#)); do
    case $1 in
        -c | --config | -d | --dataset | -e | --epochs | -lr | --learning-rate | -bs | --batch-size)
            (($# > 1)) || refuse "$1 needs a value."
            case $1 in
                -c | --config)
                    [[ -n $2 ]] || refuse "$1 needs a value."
                    config=$(realpath --canonicalize-missing -- "$2")
                    ;;
                *) training+=("$1" "$2") ;;
            esac
            shift
            ;;
        --export | --evaluate | --validate-only | --overwrite | --force | --verbose) training+=("$1") ;;
        --no-convert) convert="" ;;
        --install-deps) install=yes ;;
        --demo) demo=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        [a-z]*=*) assignments+=("$1") ;;
        *) refuse "'$1' is not an option." ;;
    esac
    shift
done
cd "$here"

# Each step runs in the background so that a signal reaches this shell at once; it is passed on as SIGTERM, because a
# background job of a script ignores SIGINT.
child=
stop() {
    if [[ -n $child ]]; then
        kill -TERM "$child" 2>/dev/null || true
        wait "$child" || true
    fi
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
step() {
    "$@" &
    child=$!
    wait "$child"
    child=
}

if [[ -n $install || -n $demo ]]; then
    step ./setup_environment.sh >/dev/null
    ((arguments > 1)) || [[ -n $demo ]] || exit 0
fi
if [[ -n $demo ]]; then
    config=${config:-configs/cpu_demo.yaml}
    training=(--evaluate "${training[@]}")
fi
config=${config:-training_config.yaml}
python=$(./setup_environment.sh --python)

if [[ -n $demo ]]; then
    step "$python" -m prmkit.demo.tiny_model --sample finetune.jsonl --output demo/model
fi
if [[ -n $convert ]]; then
    step "$python" convert_dataset.py --input finetune.jsonl --config "$config" "${assignments[@]}"
fi
step "$python" train.py --config "$config" "${training[@]}" "${assignments[@]}"
