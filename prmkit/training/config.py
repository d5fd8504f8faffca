"""One flat YAML of LLaMA Factory's keys plus overrides, to the values that a run gets and where each came from.

The way of a value: read it as LLaMA Factory would, lay the overrides over it, check everything and report every problem
at once, then fit what is left to the data and to the machine. Nothing here imports LLaMA Factory.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmkit.config_file import read_yaml, split_assignment, value_of
from prmkit.errors import UsageError
from prmkit.llamafactory_schema import Key, llamafactory_version, training_keys
from prmkit.training.adapt import Adaptation, fit_held_out, fit_machine
from prmkit.training.check import Status
from prmkit.training.config_rules import problems_in, unknown_key
from prmkit.training.contradictions import contradictions_in
from prmkit.training.data_checks import check_datasets
from prmkit.training.machine import Machine, this_machine
from prmkit.training.model_folder import check_model_folder
from prmkit.training.problem import Problem


@dataclass(frozen=True)
class Override:
    """One value from the command line, as it was typed; an empty text takes the key out of the file."""

    key: str
    text: str
    source: str
    """What the user typed it as: `--epochs`, or `key=value`."""


@dataclass(frozen=True)
class ResolvedConfig:
    """What a run is started with."""

    values: Mapping[str, Any]
    """LLaMA Factory's keys, ready for `render_yaml`."""
    sources: Mapping[str, str]
    """For every key in `values`: the file, the flag, or `derived: why`."""
    dropped: Mapping[str, str]
    """Keys that the user set and that this run does without, and why."""


def parse_assignment(text: str) -> Override:
    """Read `key=value`; see `split_assignment`."""
    return Override(*split_assignment(text), "key=value")


def resolve_config(
    path: Path,
    overrides: Sequence[Override] = (),
    *,
    machine: Machine | None = None,
    torchrun: bool = False,
    files: bool = False,
) -> ResolvedConfig:
    """Read a config, lay overrides over it, check it, and fit it to the data and the machine.

    Takes under a second. Paths in the config are relative to the working directory, as they are for LLaMA Factory.

    Args:
        path: the YAML.
        overrides: in the order of the command line.
        machine: what training can count on; this machine when it is None.
        torchrun: whether torchrun starts the training; it may start a single process, for DeepSpeed.
        files: where something is wrong, look at the model folder and the datasets too, so that all is told at once.

    Raises:
        UsageError: something is wrong with the file or the overrides; everything that is wrong is in the message.
        DataError: LLaMA Factory is not installed.
    """
    keys = training_keys()
    values, sources = _from_file(path, keys)
    problems = _lay_over(values, sources, overrides, keys)
    overridden = {override.key: override.key in values for override in overrides}
    adaptation = fit_held_out(values, overridden)
    fitted = adaptation.applied_to(values)
    problems += problems_in(fitted, keys)
    wrong = {problem.key for problem in problems}
    problems += contradictions_in({key: value for key, value in fitted.items() if key not in wrong}, keys)
    if problems:
        problems += _missing_files(fitted, {problem.key for problem in problems}) if files else []
        raise UsageError(report(path, problems, sources))
    fit_machine(fitted, machine or this_machine(), torchrun=torchrun, adaptation=adaptation)
    return _resolved(values, sources, adaptation)


def typed_values(overrides: Sequence[Override]) -> dict[str, Any]:
    """The values of overrides that stand for themselves, without a config.

    Raises:
        UsageError: something is wrong with them; everything that is wrong is in the message.
    """
    keys = training_keys()
    values: dict[str, Any] = {}
    problems = _lay_over(values, {}, overrides, keys)
    problems += [problem for problem in problems_in(values, keys) if problem.key in values]
    if problems:
        raise UsageError("\n".join(_told(problem.key, problem) for problem in problems))
    return values


def _missing_files(values: Mapping[str, Any], wrong: Collection[str]) -> Iterator[Problem]:
    """What the checks before a run would find next: nobody wants to come back for it."""
    for key, check in (("model_name_or_path", check_model_folder), ("dataset", check_datasets)):
        if isinstance(values.get(key), str) and key not in wrong:
            found = check(values)
            if found.status is Status.ERROR:
                yield Problem(key, f"{found.found}.", found.advice)


def _resolved(values: Mapping[str, Any], sources: Mapping[str, str], adaptation: Adaptation) -> ResolvedConfig:
    final = adaptation.applied_to(values)
    origins = {**sources, **{key: f"derived: {reason}" for key, (_, reason) in adaptation.derived.items()}}
    return ResolvedConfig(final, {key: origins[key] for key in final}, dict(adaptation.dropped))


def report(path: Path, problems: Sequence[Problem], sources: Mapping[str, str]) -> str:
    """All problems of a config as one text; a key that is not from the file is named with where it is from."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    typed = {key: f"{key} ({source})" for key, source in sources.items() if source != str(path)}
    lines = [f"  {_told(typed.get(problem.key, problem.key), problem)}" for problem in problems]
    return "\n".join([f"{path}: {count} (LLaMA Factory {llamafactory_version()}).", *lines])


def _told(key: str, problem: Problem) -> str:
    return f"{key}: {problem.message} {problem.hint}".rstrip()


def render_yaml(values: Mapping[str, Any]) -> str:
    """The text of a YAML that LLaMA Factory reads back as exactly these values.

    Its own writer is used, because another one leaves a text such as `1e-4` unquoted, which it reads as a number.
    """
    from omegaconf import OmegaConf

    text: str = OmegaConf.to_yaml(OmegaConf.create(dict(values)))
    return text


def _from_file(path: Path, keys: Mapping[str, Key]) -> tuple[dict[str, Any], dict[str, str]]:
    values = {key: _no_is_a_word(keys.get(key), value) for key, value in read_yaml(path).items()}
    # A null where LLaMA Factory's default is null says nothing; anywhere else the rules look at it.
    values = {key: value for key, value in values.items() if not _says_nothing(keys.get(key), value)}
    return values, dict.fromkeys(values, str(path))


def _lay_over(
    values: dict[str, Any], sources: dict[str, str], overrides: Iterable[Override], keys: Mapping[str, Key]
) -> list[Problem]:
    problems = []
    seen: dict[str, Override] = {}
    for override in overrides:
        before = seen.setdefault(override.key, override)
        if before.text != override.text:
            typed = f"{before.text} ({before.source}) and {override.text} ({override.source})"
            problems.append(Problem(override.key, f"is given twice: {typed}.", "Keep one."))
        try:
            value = _typed_value(keys.get(override.key), override.text)
        except ValueError as error:
            problems.append(Problem(override.key, f"'{override.text}' is no YAML value: {error}.", ""))
            continue
        if value is None:
            if override.key not in keys and override.key not in values:
                problems.append(unknown_key(override.key, keys))
            values.pop(override.key, None)
            sources.pop(override.key, None)
        else:
            values[override.key] = value
            sources[override.key] = override.source
    return problems


def _typed_value(key: Key | None, text: str) -> Any:
    """What a text on the command line means for a key, typed as LLaMA Factory types its own `key=value`.

    A key that holds text takes it as it stands, unless it is a list: `run_name=123` is a name, and
    `default_system="Judge: be strict"` no mapping.

    Raises:
        ValueError: the text is not YAML.
    """
    takes_text = key is not None and "str" in key.types
    try:
        value = _no_is_a_word(key, value_of(text))
    except ValueError:
        if takes_text:
            return text
        raise
    if key is not None and takes_text and type(value).__name__ not in key.types | {"NoneType", "list"}:
        return text
    return value


def _no_is_a_word(key: Key | None, value: Any) -> Any:
    # YAML reads an unquoted `no` as false, and LLaMA Factory then finds no strategy of that name.
    return "no" if value is False and key is not None and "no" in key.choices else value


def _says_nothing(key: Key | None, value: Any) -> bool:
    return value is None and key is not None and key.default is None
