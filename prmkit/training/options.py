"""The options of train.py, the outcome of a command, and the commands to run next."""

import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from prmkit.errors import ExitCode
from prmkit.llamafactory_schema import setting, training_keys
from prmkit.paths import EVALUATION
from prmkit.training.checkpoints import checkpoint_fault
from prmkit.training.config import Override, parse_assignment
from prmkit.training.launcher import Launch
from prmkit.training.resume import checkpoint_folders
from prmkit.training.run import python

DEFAULT_CONFIG = Path("training_config.yaml")


@dataclass(frozen=True)
class TrainOptions:
    """The options of train.py, with the names of its flags."""

    config: Path = DEFAULT_CONFIG
    assignments: Sequence[str] = ()
    """`key=value` strings."""
    dataset: str | None = None
    epochs: str | None = None
    learning_rate: str | None = None
    batch_size: str | None = None
    export: bool = False
    export_only: str | None = None
    """A run or checkpoint folder; empty for the run of the config; None if not requested."""
    evaluate: bool = False
    validate_only: bool = False
    force: bool = False
    overwrite: bool = False
    runs: bool = False
    verbose: bool = False
    json: bool = False
    launch: Launch = field(default_factory=Launch)

    @property
    def lacks_config(self) -> bool:
        """Whether no config was passed, and the current folder does not have the default one."""
        return self.config == DEFAULT_CONFIG and not self.config.exists()


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command."""

    code: ExitCode = ExitCode.DONE
    run: Path | None = None
    """The folder of the training run that is now finished."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The run.json of that training run."""
    exported: Path | None = None
    """The folder of the merged model."""
    was_finished: bool = False
    """Whether the training run was already finished before this command."""


def overrides_of(options: TrainOptions) -> list[Override]:
    """Return all overrides on the command line, flags first.

    Raises:
        UsageError: a string is not key=value.
    """
    flags = {
        "dataset": ("--dataset", options.dataset),
        "num_train_epochs": ("--epochs", options.epochs),
        "learning_rate": ("--learning-rate", options.learning_rate),
        "per_device_train_batch_size": ("--batch-size", options.batch_size),
    }
    typed = [Override(key, text, flag) for key, (flag, text) in flags.items() if text is not None]
    return [*typed, *map(parse_assignment, options.assignments)]


def suggest_flag(message: str, flags: Sequence[str], typed: Sequence[str]) -> str:
    """Suggest what to write instead of an unknown flag; empty for other messages.

    Args:
        message: argparse's message, for example `unrecognized arguments: --lora-rank`.
        flags: the existing flags.
        typed: the words of the command line.
    """
    _, found, words = message.partition("unrecognized arguments: --")
    flag, _, value = words.partition(" ")[0].partition("=")
    if not found:
        return ""
    after = typed[typed.index(f"--{flag}") + 1 :] if f"--{flag}" in typed else ()
    value = value or next(iter(after), "VALUE")
    if (key := flag.replace("-", "_")) in training_keys():
        return f". Write {key}={value}"
    nearest = difflib.get_close_matches(f"--{flag}", flags, n=1)
    return f". Did you mean {nearest[0]}?" if nearest else ""


# --- what to type next ----------------------------------------------------------------------------------------------

NEW_STEPS = "examples/new_steps.jsonl"
"""Example steps to score, which ship with the project."""


def _next_to_train(name: str) -> str:
    """Return the path of a file next to the running train.py, as typed from the current folder."""
    script = Path(sys.argv[0])
    return shlex.quote(str(script.parent / name if script.name == "train.py" else Path(name)))


def next_commands(options: TrainOptions, outcome: Outcome, *, evaluated: bool) -> list[str]:
    """Return the commands to run next, without those that were just carried out.

    Args:
        options: the command line.
        outcome: the command's outcome.
        evaluated: whether the same command also measured the judge.
    """
    if outcome.run is None or options.json:
        return []
    run = shlex.quote(str(outcome.run))
    commands: dict[str, str] = {}
    if evaluated:
        commands["open the report"] = _open_command(outcome.run / EVALUATION / "report.html")
    elif outcome.record.get("eval_dataset"):
        commands["measure it"] = f"{python()} {_next_to_train('evaluate_judge.py')} --run {run}"
    scoring = f"{python()} {_next_to_train('score_trajectories.py')} --run {run}"
    commands["score new steps"] = f"{scoring} {_next_to_train(NEW_STEPS)}"
    if not outcome.exported:
        commands["merge it"] = f"{shlex.join(base_command(options))} --export-only {run}"
    if outcome.was_finished and options.export_only is None:
        if longer := _longer(options, outcome.run, outcome.record):
            commands["train longer"] = shlex.join(longer)
        commands["train again"] = shlex.join([*typed_command(options), "--overwrite"])
    width = max(map(len, commands)) + 1
    return ["Next:", *(f"  {name + ':':<{width}}  {command}" for name, command in commands.items())]


def _open_command(report: Path) -> str:
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "darwin" or (has_display and shutil.which("xdg-open")):
        return f"{'open' if sys.platform == 'darwin' else 'xdg-open'} {shlex.quote(str(report))}"
    return f"{shlex.quote(str(report))} in a browser"


def base_command(options: TrainOptions) -> list[str]:
    return [python(), *shlex.split(_next_to_train("train.py")), "--config", str(options.config)]


def typed_command(options: TrainOptions, without: Collection[str] = ()) -> list[str]:
    """Return the command line as typed, except for the words that set the keys in `without`."""
    words = base_command(options)
    for override in overrides_of(options):
        if override.key not in without:
            is_flag = override.source.startswith("--")
            words += [override.source, override.text] if is_flag else [f"{override.key}={override.text}"]
    for part in fields(Launch):
        if (value := getattr(options.launch, part.name)) != part.default:
            words += [f"--{part.name.replace('_', '-')}", str(value)]
    return words + ["--export"] * options.export + ["--evaluate"] * options.evaluate


def _longer(options: TrainOptions, folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Return the command that resumes from the last checkpoint of a finished run and trains for as long again."""
    folders = checkpoint_folders(folder)
    last = next((path for path in folders if checkpoint_fault(path, contents=False) is None), None)
    if last is None:
        return []
    config = record["config"]
    by_steps = int(config.get("max_steps") or -1) > 0
    length = (
        f"max_steps={2 * int(config['max_steps'])}"
        if by_steps
        else f"num_train_epochs={2 * float(setting(config, 'num_train_epochs')):g}"
    )
    changed = {"run_name", "output_dir", "resume_from_checkpoint", "max_steps" if by_steps else "num_train_epochs"}
    longer = folder.with_name(f"{folder.name}-longer")
    return [*typed_command(options, changed), length, f"output_dir={longer}", f"resume_from_checkpoint={last}"]
