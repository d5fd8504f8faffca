"""The commands of `manage_judges.py`, one function per command."""

import argparse
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode, GateError
from prmkit.registered import VersionId, find_version, registry_folder
from prmkit.registry import describe, versions
from prmkit.registry.arguments import REPLAY

log = logging.getLogger("prmkit")

_SHOWN = 3


def execute(arguments: argparse.Namespace) -> ExitCode:
    """Run one command.

    Raises:
        DataError, UsageError, GateError: see the function of the command.
    """
    return _COMMANDS[arguments.command](registry_folder(), arguments) or ExitCode.DONE


def _add(folder: Path, arguments: argparse.Namespace) -> None:
    addition = versions.Addition(
        run=arguments.run,
        name=arguments.name,
        rows=tuple(arguments.rows),
        data=arguments.data_dir,
        parent=arguments.parent,
        why=arguments.why,
    )
    version = versions.add_version(folder, addition)
    if arguments.mlflow:
        _log_to_mlflow(folder, version)
    cli.emit(f"{version} is registered.\nnext: python manage_judges.py tag {version} production")


def _tag(folder: Path, arguments: argparse.Namespace) -> None:
    version = versions.tag_version(folder, arguments.version, arguments.tag, arguments.why)
    cli.emit(f"Tagged {version} as {arguments.tag}.")


def _roll_back(folder: Path, arguments: argparse.Namespace) -> None:
    was, now = versions.roll_back(folder, arguments.version, arguments.why)
    cli.emit(f"Rolled {arguments.version} back from {was} to {now}.")


def _remove(folder: Path, arguments: argparse.Namespace) -> None:
    cli.emit(f"Removed {versions.remove_version(folder, arguments.version, arguments.why)}.")


def _export(folder: Path, arguments: argparse.Namespace) -> None:
    version = versions.export_version(folder, arguments.version, arguments.push_ready)
    cli.emit(f"{arguments.push_ready} contains {version}, ready to upload. Read its README.md first.")


def _mlflow(folder: Path, arguments: argparse.Namespace) -> None:
    _log_to_mlflow(folder, find_version(arguments.version, folder))


def _log_to_mlflow(folder: Path, version: VersionId) -> None:
    log.info("MLflow: %s is logged as run %s", version, describe.log_version(version, folder))


def _retrain(folder: Path, arguments: argparse.Namespace) -> ExitCode:
    from prmkit.registry.batch import Retraining
    from prmkit.registry.retrain import retrain, show_retraining

    asked = Retraining(
        reference=arguments.version,
        new=tuple(arguments.new),
        start=arguments.start,
        replay=REPLAY[arguments.start] if arguments.replay is None else arguments.replay,
        margin=arguments.margin,
        settings=tuple(arguments.set),
        promote=arguments.promote_if_better,
        accept_contradiction=arguments.accept_contradiction,
        why=arguments.why,
    )
    result = retrain(folder, asked)
    is_new = result["gate"]["passed"] is not None
    if arguments.mlflow and result["version"] and is_new:
        _log_to_mlflow(folder, find_version(result["version"], folder))
    if arguments.json:
        cli.emit_json(result)
    else:
        show_retraining(result, asked)
    return ExitCode.GATE if is_new and not result["gate"]["passed"] else ExitCode.DONE


def _ab(_folder: Path, arguments: argparse.Namespace) -> None:
    from prmkit.registry import monitor

    outcomes = monitor.read_outcomes(arguments.outcomes) if arguments.outcomes else None
    found = monitor.compare_judges(monitor.read_scored(arguments.logs, arguments.days), outcomes)
    if arguments.json:
        cli.emit_json(found)
    else:
        monitor.show_ab(found)


def _drift(folder: Path, arguments: argparse.Namespace) -> None:
    from prmkit.registry import monitor

    version = find_version(arguments.judge, folder)
    steps = monitor.steps_of(str(version), monitor.read_scored(arguments.logs, arguments.days))
    found = monitor.drift_of(steps, describe.held_out_of(version, folder), arguments.limit)
    if arguments.json:
        cli.emit_json(found)
    else:
        monitor.show_drift(version, found)
    if found["findings"]:
        raise GateError(f"{version} has drifted: {'; '.join(found['findings'])}.")
    if found["undecided"]:
        others = len(found["undecided"]) - _SHOWN
        shown = [*found["undecided"][:_SHOWN], *([f"{others} other groups"] if others > 0 else [])]
        raise GateError(f"{version}: too few scores of {' and '.join(shown)} to decide.")


def _page(folder: Path, arguments: argparse.Namespace) -> None:
    from prmkit.registry import page

    page.write_versions_page(folder, arguments.output, arguments.logs, arguments.limit)
    cli.emit(f"Open {arguments.output} in a browser.")


_COMMANDS: Mapping[str, Callable[[Path, argparse.Namespace], ExitCode | None]] = {
    "add": _add,
    "list": lambda folder, arguments: describe.list_versions(folder, as_json=arguments.json),
    "show": lambda folder, arguments: describe.show_version(folder, arguments.version, as_json=arguments.json),
    "diff": lambda folder, arguments: describe.show_differences(
        folder, arguments.version, arguments.other, as_json=arguments.json
    ),
    "tag": _tag,
    "rollback": _roll_back,
    "remove": _remove,
    "export": _export,
    "retrain": _retrain,
    "ab": _ab,
    "drift": _drift,
    "page": _page,
    "mlflow": _mlflow,
    "history": lambda folder, arguments: describe.show_history(folder, as_json=arguments.json),
}
