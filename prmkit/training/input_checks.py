"""The files that a config names: the model, adapters, checkpoints, datasets, and what is held out of training.

Read from the files alone, without LLaMA Factory; what would make it fail or silently drop rows is found here.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from prmkit.dataset_info import Entry, read_entries, split_names
from prmkit.errors import DataError
from prmkit.files import read_json, read_jsonl
from prmkit.llamafactory_schema import setting
from prmkit.paths import REPORT
from prmkit.training.checkpoints import read_header, read_weights, weight_files
from prmkit.training.checks import Check, error, ok, warning
from prmkit.training.model import read_model
from prmkit.training.records import read_record

# --- the model ----------------------------------------------------------------------------------------------------

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "qwen.tiktoken")
_HUB_NAME = re.compile(r"[\w-]+(\.[\w-]+)*/[\w.-]+")
_BLOCK = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
DOWNLOAD = "Download one, for example: hf download Qwen/Qwen2.5-7B-Instruct --local-dir model"


def check_model_folder(values: Mapping[str, Any]) -> Check:
    """Are configuration, tokenizer and every weight file there and complete? About ten milliseconds."""
    name, named = "model folder", str(values["model_name_or_path"])
    folder = Path(named)
    if not folder.is_dir():
        if is_hub_name(named):
            found = f"there is no folder {named}; LLaMA Factory would download it from the hub"
            return warning(name, found, f"Download it first, so that it can be checked: hf download {named}")
        return error(name, f"model directory not found: {named}", DOWNLOAD)
    if not (folder / "config.json").is_file():
        return _check_no_config(name, folder)
    problems = list(_model_problems(folder, trusts_code=values.get("trust_remote_code") is True))
    if problems:
        return error(name, f"{folder}: {'; '.join(problems)}", "Download the model again; complete files are kept.")
    weights = read_weights(folder)
    if not weights:
        return warning(name, f"{folder}: complete, in an old format (.bin)", "Convert it to safetensors if you can.")
    count = sum(weight.size for weight in weights.values())
    return ok(name, f"{folder}: {read_json(folder / 'config.json').get('model_type')}, {count / 1e9:.3g} B parameters")


def is_hub_name(named: str) -> bool:
    """Whether a name that is not a folder here is a name on the hub.

    `models/Qwen2.5-7B` looks like one as well; where there is a folder `models`, the model is missing from it.
    """
    return bool(_HUB_NAME.fullmatch(named)) and not Path(named).parent.is_dir()


def _check_no_config(name: str, folder: Path) -> Check:
    deeper = sorted(path.parent for path in folder.glob("*/config.json"))
    deeper += sorted(path.parent for path in folder.glob("models--*/snapshots/*/config.json"))
    if deeper:
        found = f"the model's files are in {deeper[0]}, not directly in {folder}"
        return error(name, found, f"Move them up, or run with model_name_or_path={deeper[0]}")
    if (folder / "adapter_config.json").is_file():
        found = f"{folder} contains an adapter, not a model"
        return error(name, found, "Name the base model here and the adapter in adapter_name_or_path.")
    if any(folder.glob("*.gguf")):
        return error(name, f"{folder} contains GGUF files, which cannot be trained", "Download the original model.")
    content = "is empty" if all(path.name == ".gitkeep" for path in folder.iterdir()) else "has no config.json"
    return error(name, f"{folder} {content}", DOWNLOAD)


def _model_problems(folder: Path, *, trusts_code: bool) -> Iterator[str]:
    try:
        config = read_json(folder / "config.json")
    except DataError as failure:
        yield str(failure).rstrip(".")
        return
    if not isinstance(config, dict) or not config.get("model_type"):
        yield "config.json names no model_type"
        config = {}
    elif "auto_map" in config and not trusts_code and not config.get("architectures"):
        yield "the model comes with its own code, which needs trust_remote_code=true"
    yield from (
        f"config.json: {name} is {config[name]!r}, not a number"
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        if isinstance(config.get(name), str)
    )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        yield "no tokenizer (tokenizer.json or tokenizer.model)"
    yield from _weight_problems(folder)
    yield from _depth_problems(folder, config.get("num_hidden_layers"))


def _weight_problems(folder: Path) -> Iterator[str]:
    try:
        files = weight_files(folder)
    except DataError as failure:
        yield str(failure).rstrip(".")
        return
    if not files:
        yield "no weights (model*.safetensors)"
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        yield f"{len(missing)} of the {len(files)} weight files in the index are missing ({', '.join(missing[:3])})"
    for path in files:
        if path.is_file() and (problem := _file_problem(path)):
            yield f"{path.name} {problem}"


def _file_problem(path: Path) -> str | None:
    with path.open("rb") as stream:
        start = stream.read(40)
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights (git lfs pull)"
    actual = path.stat().st_size
    if path.suffix != ".safetensors":
        return None if actual > len(start) else "is truncated"
    try:
        expected = read_header(path).size
    except DataError:
        return "is not a complete safetensors file"
    return None if actual == expected else f"is truncated ({actual:,} of {expected:,} bytes)"


def _depth_problems(folder: Path, layers: Any) -> Iterator[str]:
    """A config.json of a billion layers would be built for hours, and without its weights."""
    try:
        blocks = {int(found[1]) for name in read_weights(folder) if (found := _BLOCK.search(name))}
    except DataError:
        return
    if isinstance(layers, int) and blocks and layers > max(blocks) + 1:
        yield f"config.json says {layers:,} layers, and the weights hold {max(blocks) + 1:,}"


# --- the datasets -------------------------------------------------------------------------------------------------

CONVERT = "python convert_dataset.py"
FORMATS = ("alpaca", "sharegpt", "openai")
RANKING_STAGES = ("rm", "dpo")
FILE_TYPES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".txt")
SCANNED_BYTES = 256 << 20
"""A second of reading; what is wrong in a file is nearly always wrong near its beginning."""
CHUNK_BYTES = 10 << 20
"""Arrow fixes a column's type by the first 10 MB of a file."""


def check_datasets(values: Mapping[str, Any]) -> Check:
    """Check entries, files and rows of `dataset` and `eval_dataset`."""
    folder = Path(str(setting(values, "dataset_dir")))
    try:
        entries = read_entries(folder)
    except DataError as failure:
        found, _, advice = str(failure).partition(". ")
        return error("datasets", found, advice)
    names = [*split_names(values.get("dataset")), *split_names(values.get("eval_dataset"))]
    stage = str(setting(values, "stage"))
    problems = [problem for name in names for problem in _entry_problems(name, entries, stage)]
    problems += _report_problems(folder)
    if problems:
        return error("datasets", "; ".join(problems), f"Convert the data again ({CONVERT}), or name another dataset.")
    described = ", ".join(f"{name} ({_describe_rows(entries[name])})" for name in names)
    if not all(_is_one_file(entries[name]) for name in names):
        return warning("datasets", described, "Save it as one JSONL file, so that its rows are checked and recorded.")
    return ok("datasets", described)


def _is_one_file(entry: Entry) -> bool:
    return entry.file is not None and entry.file.is_file()


def _describe_rows(entry: Entry) -> str:
    if not _is_one_file(entry):
        return "a folder: its rows are not checked" if entry.file else "from a hub or a script: not checked"
    rows = _rows_of(entry)
    return "loadable" if rows is None else f"{rows:,} row{'s' * (rows != 1)}"


def _rows_of(entry: Entry) -> int | None:
    """How many rows a dataset has; None for kinds of files that are not read here."""
    if entry.file is None or entry.file.suffix != ".jsonl" or not entry.file.is_file():
        return None
    with entry.file.open("rb") as stream:
        return sum(1 for line in stream if line.strip())


def _report_problems(folder: Path) -> Iterator[str]:
    """Is the conversion's report, which every run records, readable?"""
    path = folder / REPORT
    try:
        report = read_json(path) if path.exists() else {}
    except DataError as failure:
        yield str(failure).rstrip(".")
        return
    if not isinstance(report, dict) or not isinstance(report.get("held_out", {}), dict):
        yield f"{path}: not a conversion report"


def _entry_problems(name: str, entries: Mapping[str, Entry], stage: str) -> Iterator[str]:
    entry = entries.get(name)
    if entry is None:
        nearest = difflib.get_close_matches(name, entries, n=1)
        known = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(list(entries)[:8]) or 'none'}"
        yield f"dataset not found: {name} ({known})"
    elif entry.formatting not in FORMATS:
        yield f"{name}: formatting is {entry.formatting}, not {' or '.join(FORMATS)}"
    elif entry.ranking != (stage in RANKING_STAGES):
        holds, wanted = ("pairs", "single answers") if entry.ranking else ("single answers", "pairs: chosen, rejected")
        yield f"{name} contains {holds}, and stage: {stage} learns from {wanted}"
    elif stage == "kto" and "kto_tag" not in entry.columns:
        yield f"{name} has no column kto_tag, which stage: kto learns from"
    elif entry.file is not None and entry.file.is_dir():
        kinds = {path.suffix for path in entry.file.iterdir()}
        if len(kinds) != 1 or not kinds <= {*FILE_TYPES}:
            yield f"{entry.file} must contain files of one kind ({', '.join(FILE_TYPES)}), and nothing else"
    elif entry.file is not None:
        yield from _file_problems(entry, entry.file)


def _file_problems(entry: Entry, file: Path) -> Iterator[str]:
    if not file.is_file():
        yield f"{file} is missing"
    elif file.suffix not in FILE_TYPES:
        yield f"{file}: LLaMA Factory reads {', '.join(FILE_TYPES)}"
    elif file.stat().st_size == 0:
        yield f"{file} is empty"
    elif file.suffix == ".jsonl":
        yield from _row_problems(entry, file)


def _row_problems(entry: Entry, file: Path) -> Iterator[str]:
    """The first thing in a JSONL file that would make LLaMA Factory fail, or silently drop a row."""
    wanted = _columns(entry)
    read = 0
    large = file.stat().st_size > CHUNK_BYTES
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            read += len(line)
            if read > SCANNED_BYTES:
                return
            if problem := _row_problem(line, wanted, others_must_be_strings=large):
                yield f"{file}:{number}: {problem}"
                return


def _columns(entry: Entry) -> dict[str, type]:
    """The required columns and their types."""
    if entry.formatting != "alpaca":
        return {entry.columns.get("messages", "messages"): list}
    return {entry.columns[key]: str for key in ("prompt", "response") if key in entry.columns}


def _row_problem(line: bytes, wanted: Mapping[str, type], *, others_must_be_strings: bool) -> str | None:
    if not line.strip():
        return None
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as failure:
        return f"not JSON ({failure})"
    if not isinstance(row, dict):
        return "not an object"
    for name, kind in wanted.items():
        if name not in row:
            return f"has no column {name}"
        if not isinstance(row[name], kind):
            return f"{name} is not a {'string' if kind is str else 'list'}, and LLaMA Factory would drop the row"
    other = [name for name, value in row.items() if name not in wanted and not isinstance(value, str)]
    if other and others_must_be_strings:
        return f"column {other[0]} is not a string; if its type changes after 10 MB, loading fails. Leave it out"
    return None


def check_held_out(values: Mapping[str, Any], dropped: Mapping[str, str], *, evaluate: bool = False) -> Check:
    """Are there held-out rows, and do their tasks and prompts not appear in the training rows?

    Args:
        values: LLaMA Factory's keys.
        dropped: keys that this run leaves out, and why.
        evaluate: the judge is to be measured on them, so that it is an error when there are none.
    """
    if values.get("val_size"):
        if problem := _nothing_left(values):
            return error("held-out", problem, "Write a smaller val_size, or use eval_dataset.")
        found = "val_size holds out rows at random, so steps of one task end up on both sides"
        return warning("held-out", found, "Use eval_dataset: the conversion holds out whole tasks.")
    names, held_out = split_names(values.get("dataset")), split_names(values.get("eval_dataset"))
    if not held_out:
        found = f"none: {dropped['eval_dataset']}" if "eval_dataset" in dropped else "none"
        if evaluate:
            return error("held-out", f"{found}, and --evaluate needs some", HOLD_OUT)
        return warning("held-out", f"{found}, so nobody can say how good the judge is", HOLD_OUT)
    if both := set(names) & set(held_out):
        return error("held-out", f"{', '.join(sorted(both))} is trained on and held out", "Name its held-out side.")
    folder = Path(str(setting(values, "dataset_dir")))
    try:
        return _compare(folder, names, held_out)
    except (DataError, AttributeError, KeyError, TypeError) as failure:
        return warning("held-out", f"could not be compared: {failure}", f"Convert the data again: {CONVERT}")


HOLD_OUT = (
    f"Convert again with more held out: {CONVERT} --eval-ratio 0.3, another --split-seed, or --eval-tasks with the "
    "names of tasks."
)


def _nothing_left(values: Mapping[str, Any]) -> str | None:
    """Why `val_size` would leave no row to train on; None when it leaves some or the rows cannot be counted."""
    if values.get("streaming") or setting(values, "mix_strategy") != "concat":
        return None
    try:
        entries = read_entries(Path(str(setting(values, "dataset_dir"))))
    except DataError:
        return None  # reported by the check of the datasets
    chosen = [entries[name] for name in split_names(values.get("dataset")) if name in entries]
    counts = [entry.num_samples or _rows_of(entry) for entry in chosen]
    rows = sum(min(count, values.get("max_samples") or count) for count in counts if count)
    taken = values["val_size"] if values["val_size"] >= 1 else math.ceil(values["val_size"] * rows)
    if None in counts or not rows or taken < rows:
        return None
    return f"val_size: {values['val_size']} takes all {rows:,} rows, and none are left to train on"


def _compare(folder: Path, names: list[str], held_out: list[str]) -> Check:
    audit = _audit(folder)
    if audit is not None and audit.get("passed", True) is False:
        found = f"the conversion found {audit.get('tasks_on_both_sides', '?')} tasks on both sides"
        return error("held-out", found, f"Convert the data again: {CONVERT}")
    entries = read_entries(folder)
    sides = [[entries[name].sidecar for name in side if name in entries] for side in (names, held_out)]
    if None in (*sides[0], *sides[1]):
        return ok("held-out", f"{', '.join(held_out)}; not compared, because these rows do not name their tasks")
    trained, kept = (_identities(filter(None, side)) for side in sides)
    shared_tasks, shared_prompts = trained[0] & kept[0], trained[1] & kept[1]
    if shared_tasks or shared_prompts:
        shared = f"{_count(len(shared_tasks), 'task')} and {_count(len(shared_prompts), 'prompt')}"
        example = next(iter(shared_tasks or shared_prompts))
        return error(
            "held-out", f"{shared} are also trained on, such as {example}", f"Convert both together: {CONVERT}"
        )
    found = f"{_count(len(kept[1]), 'prompt')} of {_count(len(kept[0]), 'task')}, none trained on"
    if not kept[0]:
        advice = "Rows without task_id cannot be held out by task: steps of one task may be on both sides."
        return warning("held-out", f"{found}; no row names its task", advice)
    return ok("held-out", found)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _audit(folder: Path) -> Mapping[str, Any] | None:
    path = folder / REPORT
    report = read_json(path) if path.is_file() else None
    audit = report.get("leak_audit") if isinstance(report, dict) else None
    return audit if isinstance(audit, dict) else None


def _identities(sidecars: Iterable[Path]) -> tuple[set[str], set[str]]:
    """The tasks and the prompts of some sidecars."""
    tasks: set[str] = set()
    prompts: set[str] = set()
    for row in (row for path in sidecars for row in read_jsonl(path)):
        prompts.add(row["prompt_sha256"])
        if task := row["metadata"].get("task_id"):
            tasks.add(str(task))
    return tasks, prompts


# --- checkpoints, adapters and layers that the config names -------------------------------------------------------


def check_named_files(values: Mapping[str, Any]) -> list[Check]:
    """One check for each checkpoint, adapter, layer or saved dataset that is not what the config needs."""
    rules = (_check_checkpoint, _check_adapters, _check_layers, _check_tokenized)
    return [check for rule in rules for check in rule(values)]


def _check_checkpoint(values: Mapping[str, Any]) -> Iterator[Check]:
    path = values.get("resume_from_checkpoint")
    if isinstance(path, str) and not (Path(path) / "trainer_state.json").is_file() and not _was_used(Path(path)):
        there = sorted(str(found.parent) for found in Path(path).parent.glob("checkpoint-*/trainer_state.json"))
        advice = f"There are: {', '.join(there)}" if there else "Leave it out: the newest checkpoint is found."
        yield error("settings", f"resume_from_checkpoint: {path} is not a checkpoint", advice)


def _was_used(checkpoint: Path) -> bool:
    """Whether the run beside it resumed from this checkpoint, before LLaMA Factory deleted it as too old."""
    record = read_record(checkpoint.parent)
    return record is not None and str(checkpoint) in record["resumed_from"]


def _adapters(values: Mapping[str, Any]) -> list[Path]:
    named = values.get("adapter_name_or_path")
    return [Path(folder.strip()) for folder in named.split(",")] if isinstance(named, str) else []


def _check_adapters(values: Mapping[str, Any]) -> Iterator[Check]:
    for folder in _adapters(values):
        if not (folder / "adapter_config.json").is_file():
            found = f"adapter_name_or_path: no adapter in {folder}"
            yield error("settings", found, "Name a folder with adapter_config.json.")
    if _adapters(values) and not values.get("create_new_adapter"):
        yield from _check_shape(_adapters(values)[-1], values)


_SHAPE = {"lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "use_rslora": "use_rslora",
          "use_dora": "use_dora"}  # fmt: skip


def _check_shape(folder: Path, values: Mapping[str, Any]) -> Iterator[Check]:
    """An adapter that is trained further keeps its shape, whatever the config says."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    try:
        has = read_json(path)
    except DataError as failure:
        yield error("settings", f"adapter_name_or_path: {failure}", "Name a complete adapter.")
        return
    if not isinstance(has, dict):
        yield error("settings", f"adapter_name_or_path: {path}: not an object", "Name a complete adapter.")
        return
    same = {key: (has.get(name, values[key]), values[key]) for key, name in _SHAPE.items() if key in values}
    other = [f"{key}: {asked} (it has {actual})" for key, (actual, asked) in same.items() if actual != asked]
    targets, wanted = has.get("target_modules"), _wanted_layers(values)
    if isinstance(targets, list) and wanted and wanted != set(targets):
        other.append(f"lora_target: {values['lora_target']} (it has {','.join(sorted(targets))})")
    if other:
        found = f"adapter_name_or_path: {folder} is trained further as it is, without {', '.join(other)}"
        advice = "Write what it has, or create_new_adapter: true to merge it and train a new one."
        yield warning("settings", found, advice)


def _wanted_layers(values: Mapping[str, Any]) -> set[str]:
    """The layers that `lora_target` names; empty when it is not set, or when the model's layers are unknown."""
    wanted = split_names(values.get("lora_target"))
    if wanted != ["all"]:
        return set(wanted)
    try:
        model = read_model(Path(str(values["model_name_or_path"])))
    except (DataError, KeyError):
        return set()
    return {name.split(".")[-2] for name in model.linear_names}


def _check_layers(values: Mapping[str, Any]) -> Iterator[Check]:
    """Layers that the model does not have: if all are wrong the run fails, and single ones are silently skipped."""
    if setting(values, "finetuning_type") not in ("lora", "oft") or values.get("use_llama_pro"):
        return
    try:
        weights = read_weights(Path(str(values["model_name_or_path"])))
    except (DataError, KeyError):
        return  # reported by the check of the model folder
    if not weights:
        return
    # An output layer that shares its weights with the input is not among the saved ones.
    layers = {name.rpartition(".")[0] for name, weight in weights.items() if len(weight.shape) > 1} | {"lm_head"}
    continued = _adapters(values) and not values.get("create_new_adapter")
    targets = [] if continued else split_names(setting(values, "lora_target"))
    for name in targets if targets != ["all"] else ():
        if not any(f".{layer}".endswith(f".{name}") for layer in layers):
            yield _unknown_layer("lora_target", name, layers)
    # Here complete blocks count as well, and PEFT compares only the ends of the names.
    blocks = {".".join(parts[:end]) for name in weights if (parts := name.split(".")) for end in range(1, len(parts))}
    blocks.add("lm_head")
    for name in split_names(values.get("additional_target")):
        if not any(block.endswith(name) for block in blocks):
            yield _unknown_layer("additional_target", name, blocks)


def _unknown_layer(key: str, name: str, layers: Iterable[str]) -> Check:
    known = sorted({layer.rpartition(".")[2] for layer in layers})
    nearest = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    there = ", ".join(layer for layer in known if not layer.isdecimal())
    hint = f"Did you mean {nearest[0]}?" if nearest else f"There are: {there}."
    return error("settings", f"{key}: the model has no layer {name}", hint)


def _check_tokenized(values: Mapping[str, Any]) -> Iterator[Check]:
    """Rows that were tokenized before are used unchanged, whatever dataset and template say."""
    if "tokenized_path" not in values:
        return
    path = Path(str(values["tokenized_path"]))
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return  # this run writes it
    names = ("state.json", "dataset_info.json")
    if (path / "dataset_dict.json").is_file() or all((path / name).is_file() for name in names):
        found = f"tokenized_path: the rows in {path} are used, whatever dataset and template say"
        yield warning("settings", found, "Leave it out, or name a new folder.")
    else:
        yield error("settings", f"tokenized_path: no saved dataset in {path}", "Leave it out, or name a new folder.")
