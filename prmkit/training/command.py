"""What was asked for on the command line of train.py."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from prmkit.training.config import Override, parse_assignment
from prmkit.training.launch import Launch


@dataclass(frozen=True)
class Command:
    """The arguments, by the names of their flags."""

    config: Path = Path("training_config.yaml")
    assignments: Sequence[str] = ()
    """`key=value` texts."""
    dataset: str | None = None
    epochs: str | None = None
    learning_rate: str | None = None
    batch_size: str | None = None
    export: bool = False
    export_only: str | None = None
    """A run or checkpoint folder; empty for the run of the config; None when it was not asked for."""
    validate_only: bool = False
    force: bool = False
    overwrite: bool = False
    runs: bool = False
    verbose: bool = False
    json: bool = False
    launch: Launch = field(default_factory=Launch)


def overrides_of(command: Command) -> list[Override]:
    """Everything that was typed about the config, flags first.

    Raises:
        UsageError: a text is not key=value.
    """
    flags = {
        "dataset": ("--dataset", command.dataset),
        "num_train_epochs": ("--epochs", command.epochs),
        "learning_rate": ("--learning-rate", command.learning_rate),
        "per_device_train_batch_size": ("--batch-size", command.batch_size),
    }
    typed = [Override(key, text, flag) for key, (flag, text) in flags.items() if text is not None]
    return [*typed, *map(parse_assignment, command.assignments)]


def retyped(command: Command, without: Collection[str] = ()) -> list[str]:
    """The words that were typed, so that what is suggested is about this run; without those that set some keys."""
    words = ["python", "train.py", "--config", str(command.config)]
    for override in overrides_of(command):
        if override.key not in without:
            is_flag = override.source.startswith("--")
            words += [override.source, override.text] if is_flag else [f"{override.key}={override.text}"]
    for part in fields(Launch):
        if (value := getattr(command.launch, part.name)) != part.default:
            words += [f"--{part.name.replace('_', '-')}", str(value)]
    return words + ["--export"] * command.export
