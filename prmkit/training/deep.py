"""The checks that need LLaMA Factory itself, in one child process: its imports alone take 8 seconds.

The child does one step after the other and writes down each result at once. Where LLaMA Factory, torch or a model's own
code raises, the child simply dies; the parent then knows which step it was and shows what was raised.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.training.check import Check, Status, error, ok, warning
from prmkit.training.llamafactory import child_environment

TIMEOUT_SECONDS = 120
STEPS = {
    "LLaMA Factory starts": "Install the versions that go together: ./run_training.sh --install-deps",
    "template": "Look at the model folder's tokenizer files.",
    "row lengths": "Look at the dataset's files; or convert again: python convert_dataset.py",
    "LLaMA Factory's own parser": "Change the key that the message names.",
}
"""Every step in its order, and what to do when it raises."""

NEEDS_TORCHRUN = ("deepspeed", "fsdp", "fsdp_config", "ddp_backend")
"""Keys that LLaMA Factory's parser takes only from a process that torchrun has started."""


@dataclass(frozen=True)
class Findings:
    """What the child found."""

    checks: list[Check]
    longest_row: int | None
    """Tokens; None when the rows could not be measured."""


def look_deep(values: Mapping[str, Any], *, gpus: int) -> Findings:
    """Run the heavy checks on resolved values; about 12 seconds.

    Args:
        values: LLaMA Factory's keys.
        gpus: how many GPUs the driver shows, to be compared with what torch sees.
    """
    # LLaMA Factory's parser refuses to work where it sees several GPUs and no torchrun.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if gpus else ""
    environment = {**child_environment(), "CUDA_VISIBLE_DEVICES": visible, "LLAMAFACTORY_VERBOSITY": "ERROR"}
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder) / "request.json", Path(folder) / "result.jsonl"
        request.write_text(json.dumps({"values": dict(values), "gpus": gpus}))
        result.touch()
        command = [sys.executable, "-m", __name__, str(request), str(result)]
        try:
            child = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=TIMEOUT_SECONDS, check=False,
            )  # fmt: skip
            failure = _cause(child.stderr) or f"exit code {child.returncode}"
        except subprocess.TimeoutExpired:
            failure = f"no end after {TIMEOUT_SECONDS} seconds"
        return _findings([json.loads(line) for line in result.read_text().splitlines()], failure)


def _cause(traceback: str) -> str:
    """What was raised, and what was raised over it: transformers hides a broken torchvision behind another error."""
    raised = re.findall(r"^[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)\b.*$", traceback, re.MULTILINE)
    return "; then ".join(dict.fromkeys([*raised[:1], *raised[-1:]]))


def _findings(results: list[dict[str, Any]], failure: str) -> Findings:
    checks = (Check(**{**entry["check"], "status": Status(entry["check"]["status"])}) for entry in results)
    found = {check.name: check for check in checks}
    for step in [step for step in STEPS if step not in found][:1]:
        found[step] = error(step, failure, STEPS[step])
    longest = next((entry["longest"] for entry in results if entry["longest"]), None)
    return Findings([found[step] for step in STEPS if step in found], longest)


def main() -> None:
    """The child: `python -m prmkit.training.deep REQUEST RESULT`."""
    request, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    values = request["values"]

    def done(check: Check, longest: int | None = None) -> None:
        with result.open("a") as stream:
            stream.write(json.dumps({"check": asdict(check), "longest": longest}) + "\n")

    done(_starts(request["gpus"]))
    try:
        _template_and_rows(values, done)
    finally:
        # A tokenizer that raises something of its own must not hide what the parser has to say.
        done(_parser(values, result.with_name("run")))


def _starts(gpus: int) -> Check:
    from importlib import metadata

    import llamafactory.data.template  # noqa: F401  with torch, torchvision, torchaudio, peft: nearly all of a training
    import torch

    name = "LLaMA Factory starts"
    if gpus and not torch.cuda.is_available():
        found = f"torch {torch.__version__} cannot use the GPU that the driver shows (CUDA {torch.version.cuda})"
        return error(name, found, "Update the NVIDIA driver, or install the torch build for your CUDA version.")
    return ok(name, f"LLaMA Factory {metadata.version('llamafactory')}, torch {torch.__version__}")


def _template_and_rows(values: Mapping[str, Any], done: Callable[..., None]) -> None:
    from prmkit.encoding import load_encoding
    from prmkit.training.row_lengths import check_lengths, measure
    from prmkit.training.template_check import check_template

    try:
        encoding = load_encoding(
            Path(values["model_name_or_path"]),
            values.get("template"),
            default_system=values.get("default_system"),
            enable_thinking=values.get("enable_thinking", True),
            trust_remote_code=bool(values.get("trust_remote_code")),
        )
    except (DataError, UsageError) as failure:
        done(error("template", str(failure), STEPS["template"]))
        done(warning("row lengths", "not measured, for want of a tokenizer", "Mend the model folder first."))
        return
    done(check_template(encoding, values))
    try:
        lengths = measure(encoding, values)
    except DataError as failure:
        done(warning("row lengths", f"not measured: {failure}", "Mend the dataset first."))
        return
    done(check_lengths(lengths, values), lengths.longest if lengths else None)


def _parser(values: Mapping[str, Any], fresh: Path) -> Check:
    from llamafactory.hparams import get_train_args

    left_out = [key for key in NEEDS_TORCHRUN if key in values]
    kept = {key: value for key, value in values.items() if key not in left_out}
    # It refuses an output folder that holds an adapter, and looks for checkpoints: what a launch sees to by itself.
    get_train_args({**kept, "output_dir": str(fresh), "resume_from_checkpoint": None})
    without = f" (without {', '.join(left_out)}, which it takes only under torchrun)" if left_out else ""
    return ok("LLaMA Factory's own parser", f"takes all {len(kept)} keys{without}")


if __name__ == "__main__":
    main()
