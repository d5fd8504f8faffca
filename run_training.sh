#!/usr/bin/env bash
# From judged rows to a judge: convert, train, and on request evaluate and export. All decisions are made in Python.
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: ./run_training.sh [options] [key=value ...]

  -i,  --input FILE           your rows, a file or a folder; can be repeated (default: finetune.jsonl, the sample)
  -c,  --config FILE          the configuration (default: training_config.yaml)
  -d,  --dataset NAME         the variant to train on, such as reward_model_full
  -e,  --epochs N             passes over the data
  -lr, --learning-rate X      the peak learning rate
  -bs, --batch-size N         rows per device and step
       key=value              any key of LLaMA Factory, such as lora_rank=32
       --evaluate             after training, measure the judge on held-out rows
       --export               after training, merge the adapter into the base model
       --validate-only        convert and check everything, but do not train
       --no-convert           use the data from an earlier conversion
       --overwrite            rename an earlier training run of the same name and start again
       --force                train even if the checks found errors
       --verbose              show everything that LLaMA Factory prints
       --install-deps         install the pinned dependencies; with no other option, stop there
       --demo                 run the whole pipeline on the sample with a tiny model, on a CPU, in demo/
       --model smollm2        with --demo: use a small real model instead (downloads 93 MB)
  -h,  --help                 show this text

For several processes and nodes (see python train.py --help):
       --nproc, --nnodes, --node-rank, --master-addr, --master-port, --rdzv-id, --max-restarts

Exit codes: 0 done, 1 bad data or environment, 2 bad command or configuration, 3 LLaMA Factory failed, 4 a gate was not
met, 130 or 143 interrupted. Run the same command again to continue where it stopped.
USAGE
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
switches=(--evaluate --export --validate-only --overwrite --force --verbose) # passed on to train.py
valued=(--dataset --epochs --learning-rate --batch-size
    --nproc --nnodes --node-rank --master-addr --master-port --rdzv-id --max-restarts) # the same, with a value
converting=(--rubric --format --labels --mask-leaked-scores --max-rejected --no-task-variants
    --evaluation-types --model-names --task-ids --name --eval-ratio --split-seed --eval-tasks --near-duplicates
    --scale --map --aggregate --no-leniency-correction --max-disagreement --too-long) # refused, with advice
options=(--input --config --model --no-convert --install-deps --demo --help "${switches[@]}" "${valued[@]}")

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}

is_one_of() {
    local wanted=$1 each
    shift
    for each in "$@"; do [[ $each == "$wanted" ]] && return; done
    return 1
}

# Print the full name of an option: short names and unique beginnings (--epoch) are accepted, as train.py does.
full_name() {
    local short=(-i --input -c --config -d --dataset -e --epochs -lr --learning-rate -bs --batch-size -h --help) i each
    local matches=()
    for ((i = 0; i < ${#short[@]}; i += 2)); do
        [[ $1 == "${short[i]}" ]] && printf '%s' "${short[i + 1]}" && return
    done
    for each in "${options[@]}"; do
        [[ $1 == "$each" ]] && printf '%s' "$each" && return
        [[ $1 == --?* && $each == "$1"* ]] && matches+=("$each")
    done
    ((${#matches[@]} == 1)) && printf '%s' "${matches[0]}" && return
    ((${#matches[@]} == 0)) || fail "$1 could be ${matches[*]}. Write the full option."
    if is_one_of "$1" "${converting[@]}"; then
        fail "$1 is an option of convert_dataset.py. Convert with it, then run ./run_training.sh --no-convert"
    fi
    case $1 in
        --output-dir) fail "Write dataset_dir=FOLDER instead of $1 here, because the training reads the same folder." ;;
        --tokenizer) fail "Write model_name_or_path=FOLDER instead of $1 here, because that model is trained." ;;
        --template) fail "Write template=NAME instead of $1 here, because the training needs it as well." ;;
        --cutoff-len) fail "Write cutoff_len=N instead of $1 here, because the training needs it as well." ;;
        --audit) fail "$1 is an option of convert_dataset.py alone: python convert_dataset.py $1 FOLDER" ;;
        --json) fail "$1 is an option of convert_dataset.py and of train.py. Run the two separately, each with $1." ;;
        --runs | --export-only | --judge) fail "$1 is an option of train.py alone: python train.py $1" ;;
    esac
    fail "'$1' is not an option.$(suggest "$1") See ./run_training.sh --help"
}

suggest() {
    local python
    python=$("$here/setup_environment.sh" --python 2>/dev/null) || return 0
    "$python" -c '
import difflib, sys
typed, *options = sys.argv[1:]
name = typed.lstrip("-").replace("_", "-")
close = difflib.get_close_matches("--" + name, options, n=1, cutoff=0.8)
key = name.replace("-", "_")
print(f" Did you mean {close[0]}?" if close else f" A key of LLaMA Factory is written {key}=VALUE.", end="")
' "$1" "${options[@]}"
}

config="" convert=yes demo="" install="" model="" validate=""
inputs=()      # your rows
raw_runs=""    # whether the demo also shows a judge of raw runs
training=()    # passed on to train.py
assignments=() # passed on to convert_dataset.py as well
arguments=$#
while (($#)); do
    if [[ $1 != -* ]]; then
        [[ $1 == [a-z]*=* ]] || fail "'$1' is neither an option nor key=value. See ./run_training.sh --help"
        assignments+=("$1")
        shift
        continue
    fi
    option=$1 value="" has_value=""
    if [[ $option == --*=* ]]; then
        value=${option#*=} option=${option%%=*} has_value=yes
    fi
    option=$(full_name "$option") || exit
    shift
    if is_one_of "$option" --input --config --model "${valued[@]}"; then
        if [[ -z $has_value ]]; then
            (($#)) || fail "$option needs a value."
            value=$1
            shift
        fi
        [[ -n $value ]] || fail "$option needs a value."
    elif [[ -n $has_value ]]; then
        fail "$option takes no value."
    fi
    case $option in
        --input)
            if [[ $value != - ]]; then
                [[ -e $value ]] || fail "$value: no such file. Pass a file with your rows, one JSON object per line." 1
                value=$(realpath -- "$value")
            fi
            inputs+=("$value")
            ;;
        --config) config=$(realpath --canonicalize-missing -- "$value") ;;
        --model) model=$value ;;
        --no-convert) convert="" ;;
        --install-deps) install=yes ;;
        --demo) demo=yes ;;
        --help)
            usage
            exit 0
            ;;
        *)
            training+=("$option")
            if is_one_of "$option" "${valued[@]}"; then training+=("$value"); fi
            if [[ $option == --validate-only ]]; then validate=yes; fi
            ;;
    esac
done
((${#inputs[@]} == 0)) || [[ -n $convert ]] || fail "--input and --no-convert contradict each other. Choose one."
((${#inputs[@]} == 0)) || [[ -z $demo ]] || fail "--demo runs on the sample. Leave out --demo to use your own rows."
[[ -z $model || ($model == smollm2 && -n $demo) ]] ||
    fail "--model takes smollm2, and only with --demo. For another model, write model_name_or_path=FOLDER."
((${#inputs[@]})) || inputs=(finetune.jsonl)
cd "$here"

# Each step runs in the background so that a signal reaches this shell immediately. The signal is passed on as SIGTERM,
# because a background job of a script ignores SIGINT.
child=
stop() {
    if [[ -n $child ]]; then
        kill -TERM "$child" 2>/dev/null || true
        wait "$child" || true
    fi
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM HUP
step() {
    "$@" <&0 &
    child=$!
    local code=0
    wait "$child" || code=$?
    child=
    return "$code"
}

if [[ -n $install || -n $demo ]]; then
    step ./setup_environment.sh >/dev/null
    ((arguments > 1)) || [[ -n $demo ]] || exit 0
fi
if [[ -n $demo ]]; then
    if [[ -n $model ]]; then config=${config:-configs/cpu_smollm2.yaml}; fi
    if [[ -z $config ]]; then raw_runs=yes; fi
    config=${config:-configs/cpu_demo.yaml}
    training=(--evaluate "${training[@]}")
fi
config=${config:-training_config.yaml}
python=$(./setup_environment.sh --python)
"$python" -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))' \
    orjson omegaconf llamafactory torch ||
    fail "the packages that prmkit needs are not installed for $python. Run ./run_training.sh --install-deps once." 1

if [[ -n $model ]]; then
    step "$python" -m tools.demo.smollm2 --output demo/smollm2
elif [[ -n $demo ]]; then
    step "$python" -m tools.demo.tiny_model --sample finetune.jsonl --output demo/model
fi
if [[ -n $convert ]]; then
    step "$python" convert_dataset.py --no-next --input "${inputs[@]}" --config "$config" "${assignments[@]}"
fi
step "$python" train.py --config "$config" "${training[@]}" "${assignments[@]}"
if [[ -n $demo && -z $validate ]]; then
    echo "  use your rows:    ./run_training.sh --input my_rows.jsonl --validate-only"
fi
if [[ -n $raw_runs && -z $validate ]]; then # raw runs lack the prompts that the judge above was trained on
    printf '\nNext, a judge of raw runs, trained on labelled ones:\n\n'
    step "$python" import_trajectories.py examples/labelled_runs.jsonl --labels column --label-key labels \
        --output demo/labelled_steps.jsonl
    step "$python" convert_dataset.py --no-next --input demo/labelled_steps.jsonl --config "$config" \
        "${assignments[@]}" --output-dir demo/step_data >/dev/null
    step "$python" train.py --config "$config" "${assignments[@]}" \
        dataset_dir=demo/step_data output_dir=demo/saves/step_judge >/dev/null
    printf '\nAn unseen run, examples/trace.json, scored step by step:\n\n'
    step "$python" score_trajectories.py --run demo/saves/step_judge examples/trace.json \
        --output demo/scores.jsonl --html demo/run.html || (($? == 1)) # 1: the judge is unsure of a step
    echo "  look at it:       demo/run.html in a browser"
fi
