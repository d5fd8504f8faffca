"""Run every check before training, in a separate process: `python -m prmkit.training.preflight`.

Each check says what it found and what to do. They run in a child of `train.py` (`run_checks`), because the last ones
import LLaMA Factory, which takes 8 seconds, and run a model's own code and chat template, which may raise anything, or
hang.

The request on standard input is a JSON object: `values`, `dropped`, `sources` (of the resolved config), `processes`,
`world_size`, `evaluate`, `parent` (the process id of `train.py`). Standard output has one JSON object per line:
`{"begin": NAME, "advice": what to do if the check crashes, "note": what to show meanwhile}` or a check.
"""

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from prmkit.cli import relax_collector
from prmkit.errors import DataError
from prmkit.llamafactory_schema import setting
from prmkit.training import llamafactory_checks, row_lengths
from prmkit.training.checks import Check, Status, check_settings, error, errors_in
from prmkit.training.data_checks import check_datasets, check_held_out
from prmkit.training.environment import (
    check_command,
    check_disk,
    check_gpu,
    check_packages,
    check_precision,
    check_python,
    check_versions,
    this_machine,
)
from prmkit.training.launcher import child_environment
from prmkit.training.model import Model, check_memory, checkpoint_bytes, read_model
from prmkit.training.model_checks import check_model_folder, check_named_files
from prmkit.training.monitoring import check_swanlab
from prmkit.training.supervisor import die_with_parent

# --- the parent ---------------------------------------------------------------------------------------------------

CHECK_SECONDS = 120.0
"""The maximum number of seconds for one check."""


def run_checks(request: Mapping[str, Any], show: Callable[[Check | str], None]) -> list[Check]:
    """Run this module in a child process, because LLaMA Factory or a model's own code may crash it.

    Args:
        request: as described at the top of this file, without `parent`.
        show: called with every check as it ends, and with a sentence before a check that takes seconds.

    Returns:
        Every check; one that took too long or in which the child died is an error.
    """
    checks: list[Check] = []
    # If the child dies between two checks, there must still be an error.
    begun = {"all checks": "Install the versions that fit together: ./run_training.sh --install-deps"}
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "prmkit.training.preflight"],
            env={**child_environment(), "LLAMAFACTORY_VERBOSITY": "ERROR"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        try:
            for message in _messages(child, json.dumps({**request, "parent": os.getpid()}).encode()):
                if "ended" in message:
                    del begun["all checks"]
                    continue
                if "begin" in message:
                    begun[message["begin"]] = message["advice"]
                    if message["note"]:
                        show(message["note"])
                    continue
                begun.pop(message["name"], None)
                checks.append(Check(**{**message, "status": Status(message["status"])}))
                show(checks[-1])
            failure = f"no result after {CHECK_SECONDS:.0f} seconds" if child.poll() is None else None
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        failure = failure or _raised(errors.read().decode(errors="replace")) or f"exit code {child.returncode}"
    if len(begun) > 1:  # the check that failed is known
        begun.pop("all checks", None)
    for name, advice in begun.items():
        checks.append(error(name, failure, advice))
        show(checks[-1])
    return checks


def _messages(child: subprocess.Popen[bytes], request: bytes) -> Iterator[dict[str, Any]]:
    """Yield the child's JSON lines until it ends or is silent for too long."""
    if child.stdin is None or child.stdout is None:
        raise TypeError("the child needs two pipes")
    with contextlib.suppress(BrokenPipeError), child.stdin:  # it may die while starting; its standard error says why
        child.stdin.write(request)
    rest = b""
    while select.select([child.stdout], [], [], CHECK_SECONDS)[0]:
        read = os.read(child.stdout.fileno(), 1 << 16)
        if not read:
            child.wait()
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from map(json.loads, lines)


def _raised(traceback: str) -> str:
    """Return a traceback's first and last error: transformers hides a broken torchvision behind another error."""
    raised = re.findall(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)\b.*$", traceback, re.MULTILINE)
    return "; then ".join(dict.fromkeys([*raised[:1], *raised[-1:]]))


# --- the child ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Carry out the request on standard input, as described at the top of this file."""
    relax_collector()
    request = json.load(sys.stdin)
    die_with_parent(request["parent"])
    # LLaMA Factory logs to stdout, which is only for results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    run_preflight(request, results)
    _write(results, {"ended": True})


def run_preflight(request: Mapping[str, Any], results: IO[str]) -> None:
    """Run every check, quick ones first, and write each result immediately."""
    values, machine = request["values"], this_machine()

    def done(checks: Iterable[Check]) -> list[Check]:
        written = list(checks)
        for check in written:
            _write(results, asdict(check))
        return written

    def begin(name: str, advice: str, note: str = "") -> None:
        _write(results, {"begin": name, "advice": advice, "note": note})

    versions = done([check_python(), check_versions(), check_command()])
    (model_check,) = done([check_model_folder(values)])
    done([check_datasets(values), check_held_out(values, request["dropped"], evaluate=request["evaluate"])])
    done(check_named_files(values))
    done(check_settings(values))
    model = _sizes(values, model_check)
    parameters = model.parameters if model else 0
    done([check_gpu(values, machine, processes=request["processes"], parameters=parameters)])
    done([check_precision(values, request["dropped"])])
    done([check_disk(values, checkpoint_bytes(model, values) if model else None), check_packages(values, machine)])
    done([check_swanlab(values, request["dropped"], request["sources"])])
    longest = None if errors_in(versions) else _check_llamafactory(values, len(machine.gpus), begin, done)
    cutoff = int(setting(values, "cutoff_len"))
    tokens = min(cutoff, longest or cutoff)
    done(check_memory(model, values, machine, tokens=tokens, world_size=request["world_size"]))


def _write(results: IO[str], message: Mapping[str, Any]) -> None:
    results.write(json.dumps(message) + "\n")
    results.flush()


def _sizes(values: Mapping[str, Any], model_check: Check) -> Model | None:
    if model_check.status is not Status.OK:
        return None
    try:
        return read_model(Path(str(values["model_name_or_path"])))
    except DataError:
        return None


def _check_llamafactory(
    values: Mapping[str, Any], gpus: int, begin: Callable[..., None], done: Callable[[Iterable[Check]], list[Check]]
) -> int | None:
    """Run the checks that import LLaMA Factory; return the longest row in tokens, if it could be measured."""
    note = "Loading LLaMA Factory and the tokenizer; this takes about 10 seconds."
    begin("LLaMA Factory starts", "Install the versions that fit together: ./run_training.sh --install-deps", note)
    # Its parser refuses several GPUs without torchrun.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if gpus else ""
    if not llamafactory_checks.hub_answers(str(values["model_name_or_path"])):
        os.environ["HF_HUB_OFFLINE"] = "1"
    done([llamafactory_checks.check_start(gpus)])
    try:
        begin("template", "Check the tokenizer files in the model folder.")
        found, encoding = llamafactory_checks.check_encoding(values)
        done(found)
        begin("row lengths", "Check the dataset's files, or convert again: python convert_dataset.py")
        check, longest = row_lengths.check_rows(encoding, values)
        done([check])
    finally:
        # A tokenizer that raises must not hide what the parser reports.
        begin("LLaMA Factory's own parser", "Change the key in the message.")
        check, arguments = llamafactory_checks.check_parser(values)
        done([check])
        begin("trainer", llamafactory_checks.TRAINER_ADVICE)
        done([llamafactory_checks.check_trainer(arguments)])
    return longest


if __name__ == "__main__":
    main()
