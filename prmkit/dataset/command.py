"""The command line of convert_dataset.py: what its arguments mean."""

import argparse
import logging
import re
from pathlib import Path
from typing import Any

from prmkit import cli
from prmkit.config_file import read_yaml, split_assignment, value_of
from prmkit.dataset.audit import audit, read_datasets
from prmkit.dataset.convert import convert
from prmkit.dataset.filters import Filters
from prmkit.dataset.finish import leaks_told
from prmkit.dataset.lengths import LengthSettings
from prmkit.dataset.settings import Settings
from prmkit.dataset.split import Split, read_tasks
from prmkit.dataset.summary import show_summary
from prmkit.dataset.variants import CONSENSUS, FULL
from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.files import read_json
from prmkit.paths import HELD_OUT_SUFFIX, REPORT

log = logging.getLogger(__name__)


def execute(arguments: argparse.Namespace) -> ExitCode:
    """Convert, or audit what was converted.

    Raises:
        UsageError: arguments contradict each other.
        DataError: see `convert` and `audit`.
    """
    if arguments.audit is not None:
        return _audit(arguments.audit, as_json=arguments.json)
    if arguments.output_dir is None:
        arguments.output_dir = Path(str(_config(arguments).get("dataset_dir") or "data"))
    report = convert(_settings(arguments))
    if arguments.json:
        cli.emit_json(report)
    else:
        show_summary(report)
    return ExitCode.DONE


def _audit(folder: Path, *, as_json: bool) -> ExitCode:
    found = audit(read_datasets(folder))
    if as_json:
        cli.emit_json(found)
    elif found["passed"]:
        cli.emit(
            f"{folder}: no leak. {found['held_out_rows']:,} rows and {found['held_out_tasks']:,} tasks in "
            f"{found['held_out_datasets']:,} held-out datasets, {found['training_datasets']:,} training datasets."
        )
    if not found["passed"]:
        raise DataError(f"{folder}: {leaks_told(found)}")
    return ExitCode.DONE


def _settings(arguments: argparse.Namespace) -> Settings:
    filters = Filters(_values(arguments.evaluation_types), _values(arguments.model_names), _values(arguments.task_ids))
    _check(arguments, filters)
    return Settings(
        inputs=tuple(arguments.input),
        output=arguments.output_dir,
        filters=filters,
        name=arguments.name or Settings.name,
        form=arguments.format,
        labels=arguments.labels,
        split=_split(arguments, filters),
        aggregate=arguments.aggregate,
        max_disagreement=arguments.max_disagreement,
        mask_leaked_scores=arguments.mask_leaked_scores,
        max_rejected=arguments.max_rejected,
        task_variants=arguments.task_variants,
        lengths=_lengths(arguments),
        processes=arguments.processes,
    )


def _values(values: list[str] | None) -> frozenset[str] | None:
    return None if values is None else frozenset(values)


def _check(arguments: argparse.Namespace, filters: Filters) -> None:
    """Refuse what cannot be meant, all of it at once.

    Raises:
        UsageError: with one line a problem.
    """
    name, limit = arguments.name, arguments.max_rejected
    problems = {
        "--eval-ratio: a share of tasks, from 0 to below 1": arguments.eval_ratio is not None
        and not 0 <= arguments.eval_ratio < 1,
        "--eval-tasks replaces --eval-ratio and --split-seed: choose": arguments.eval_tasks is not None
        and (arguments.eval_ratio is not None or arguments.split_seed is not None),
        "--max-disagreement: a difference of scores, 0 to 1": arguments.max_disagreement is not None
        and not 0 <= arguments.max_disagreement <= 1,
        "--max-rejected: a share such as 5% or a number of rows": limit is not None
        and not re.fullmatch(r"\d+|\d+(\.\d+)?%", limit),
        "--name: names the variant that filters write; give --evaluation-types, --model-names or --task-ids": bool(name)
        and not filters,
        f"--name: letters, digits, '_', '-' and '.', not ending in {HELD_OUT_SUFFIX}": name is not None
        and (not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,100}", name, re.ASCII) or name.endswith(HELD_OUT_SUFFIX)),
        f"--name: {name} is a variant of the main conversion": name in (FULL, CONSENSUS),
        "--processes: at least 1": arguments.processes < 1,
        "key=value goes before what --config says: give a --config": bool(arguments.assignments)
        and arguments.config is None,
        "--tokenizer needs --cutoff-len, or a --config that has it": arguments.tokenizer is not None
        and arguments.cutoff_len is None
        and arguments.config is None,
        "--cutoff-len and --template need --tokenizer, or a --config that has model_name_or_path": (
            arguments.cutoff_len is not None or arguments.template is not None
        )
        and arguments.tokenizer is None
        and arguments.config is None,
        "--cutoff-len: a number of tokens, at least 1": arguments.cutoff_len is not None and arguments.cutoff_len < 1,
    }
    if found := [problem for problem, is_one in problems.items() if is_one]:
        raise UsageError("\n  ".join(found))


def _split(arguments: argparse.Namespace, filters: Filters) -> Split:
    if arguments.eval_tasks is not None:
        return Split(tasks=read_tasks(arguments.eval_tasks))
    given = {
        key: value
        for key, value in (("ratio", arguments.eval_ratio), ("seed", arguments.split_seed))
        if value is not None
    }
    if filters and not given and (earlier := _earlier_split(arguments.output_dir / REPORT)):
        return earlier
    return Split(**given)


def _earlier_split(report: Path) -> Split | None:
    """The split of the main conversion in the folder: a filtered variant is to hold out the same tasks."""
    if not report.exists():
        return None
    try:
        settings = read_json(report)["settings"]["split"]
        tasks = settings["tasks"]
        return Split(float(settings["ratio"]), int(settings["seed"]), None if tasks is None else frozenset(tasks))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{report}: damaged ({error!r}). Run the conversion without filters first.") from error


def _lengths(arguments: argparse.Namespace) -> LengthSettings | None:
    """What to measure lengths with: the flags, and what they leave out from the configuration."""
    config = _config(arguments)
    folder = arguments.tokenizer or config.get("model_name_or_path")
    if not folder:
        return None
    folder = Path(folder)
    if not _holds_a_model(folder):
        if arguments.tokenizer is not None:
            raise DataError(f"{folder}: holds no tokenizer. --tokenizer is the folder of a downloaded model.")
        log.warning(
            "warning: no model in %s, so the length guard is left out: LLaMA Factory will cut prompts that are too "
            "long, in silence. Convert again when the model is there.",
            folder,
        )
        return None
    cutoff_len = arguments.cutoff_len if arguments.cutoff_len is not None else config.get("cutoff_len", 2048)
    if type(cutoff_len) is not int or cutoff_len < 1:
        raise UsageError(f"{arguments.config}: cutoff_len is {cutoff_len!r}, expected a number of tokens.")
    return LengthSettings(
        tokenizer=folder,
        template=arguments.template or config.get("template"),
        cutoff_len=cutoff_len,
        too_long=arguments.too_long,
        packing=bool(config.get("packing") or config.get("neat_packing")),
        default_system=config.get("default_system"),
        enable_thinking=config.get("enable_thinking", True),
        trust_remote_code=bool(config.get("trust_remote_code", False)),
    )


_TEXTS = ("model_name_or_path", "template", "default_system", "dataset_dir")
"""Keys whose values are texts, whatever YAML would make of them."""


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    """What --config says, with the key=value texts laid over it; what a conversion has no use for is for train.py.

    Raises:
        UsageError: the file cannot be read, or a text is not key=value.
    """
    config = read_yaml(arguments.config) if arguments.config is not None else {}
    for text in arguments.assignments:
        if "=" not in text:
            raise UsageError(f"'{text}' is not key=value. Inputs are named behind --input.")
        key, value = split_assignment(text)
        if value:
            config[key] = value if key in _TEXTS else _value_or_text(value)
        else:
            config.pop(key, None)
    return config


def _value_or_text(text: str) -> Any:
    try:
        return value_of(text)
    except ValueError:
        return text


def _holds_a_model(folder: Path) -> bool:
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
