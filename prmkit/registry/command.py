"""What the commands of manage_judges.py do."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.registered import registry_folder
from prmkit.registry import describe, versions


def execute(arguments: argparse.Namespace) -> ExitCode:
    """Run one command.

    Raises:
        DataError, UsageError, GateError: see the function of the command.
    """
    return _COMMANDS[arguments.command](registry_folder(), arguments) or ExitCode.DONE


def _add(folder: Path, arguments: argparse.Namespace) -> None:
    addition = versions.Addition(
        arguments.run,
        arguments.name,
        tuple(arguments.rows),
        arguments.data_dir,
        parent=arguments.parent,
        why=arguments.why,
    )
    version = versions.add_version(folder, addition)
    cli.emit(f"{version}: registered.\nnext: python manage_judges.py tag {version} production")


def _tag(folder: Path, arguments: argparse.Namespace) -> None:
    version = versions.tag_version(folder, arguments.version, arguments.tag, arguments.why)
    cli.emit(f"{version}: is {arguments.tag}.")


def _roll_back(folder: Path, arguments: argparse.Namespace) -> None:
    was, now = versions.roll_back(folder, arguments.version, arguments.why)
    cli.emit(f"{arguments.version}: was {was}, is {now} again.")


def _remove(folder: Path, arguments: argparse.Namespace) -> None:
    cli.emit(f"{versions.remove_version(folder, arguments.version, arguments.why)}: removed.")


def _export(folder: Path, arguments: argparse.Namespace) -> None:
    version = versions.export_version(folder, arguments.version, arguments.push_ready)
    cli.emit(f"{arguments.push_ready}: {version}, ready to be uploaded. Read its README.md first.")


def _retrain(folder: Path, arguments: argparse.Namespace) -> ExitCode:
    from prmkit.registry.retrain import Retraining, exit_code_of, retrain

    default = 1.0 if arguments.start == "base" else 0.3
    asked = Retraining(
        reference=arguments.version,
        new=tuple(arguments.new),
        start=arguments.start,
        replay=default if arguments.replay is None else arguments.replay,
        margin=arguments.margin,
        settings=tuple(arguments.set),
        promote=arguments.promote_if_better,
        accept_contradiction=arguments.accept_contradiction,
        why=arguments.why,
    )
    result = retrain(folder, asked)
    if arguments.json:
        cli.emit_json(result)
    else:
        describe.show_retraining(result)
    return exit_code_of(result)


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
    "history": lambda folder, arguments: describe.show_history(folder, as_json=arguments.json),
}
