"""The checks that need LLaMA Factory itself, in one child process: its imports alone take 8 seconds.

The child reads the config from its standard input, does one step after the other, and writes each result at once to
its standard output. Where LLaMA Factory, torch or a model's own code raises, the child simply dies; the parent then
knows which step it was and shows what was raised.
"""

import ctypes
import json
import os
import re
import signal
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
from prmkit.training.model_folder import is_hub_name

TIMEOUT_SECONDS = 120
HUB_SECONDS = 5.0
STEPS = {
    "LLaMA Factory starts": "Install the versions that go together: ./run_training.sh --install-deps",
    "template": "Look at the model folder's tokenizer files.",
    "row lengths": "Look at the dataset's files; or convert again: python convert_dataset.py",
    "LLaMA Factory's own parser": "Change the key that the message names.",
    "trainer": "Change the keys that are named, or install what the messages name.",
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
    request = json.dumps({"values": dict(values), "gpus": gpus, "parent": os.getpid()}).encode()
    command = [sys.executable, "-m", __name__]
    try:
        child = subprocess.run(
            command, env=environment, input=request, capture_output=True, timeout=TIMEOUT_SECONDS, check=False
        )
        said, failure = child.stdout, _cause(child.stderr.decode(errors="replace")) or f"exit code {child.returncode}"
    except subprocess.TimeoutExpired as expired:
        said, failure = expired.stdout or b"", f"no end after {TIMEOUT_SECONDS} seconds"
    # What stands after the last line break is a line that the child was killed in.
    return _findings([json.loads(line) for line in said.split(b"\n")[:-1]], failure)


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
    """The child: `python -m prmkit.training.deep`, the request on its standard input."""
    request = json.load(sys.stdin)
    _end_with(request["parent"])
    values = request["values"]
    # LLaMA Factory logs to stdout, which is for results alone.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def done(check: Check, longest: int | None = None) -> None:
        results.write(json.dumps({"check": asdict(check), "longest": longest}) + "\n")
        results.flush()

    if _is_out_of_reach(str(values["model_name_or_path"])):
        os.environ["HF_HUB_OFFLINE"] = "1"
    done(_starts(request["gpus"]))
    try:
        _template_and_rows(values, done)
    finally:
        # A tokenizer that raises something of its own must not hide what the parser has to say.
        check, arguments = _parse(values)
        done(check)
        done(_trainer(arguments))


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when `train.py` ends, however it ends; see prctl(2)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the kernel was asked
        sys.exit()


_PR_SET_PDEATHSIG = 1


def _is_out_of_reach(name: str) -> bool:
    """Whether a model would come from the hub and the hub does not answer.

    It is asked once here, for a few seconds: huggingface_hub itself asks for each file six times, for most of a minute,
    before it looks at what was downloaded earlier.
    """
    from urllib import error, request

    if Path(name).is_dir() or not is_hub_name(name) or "HF_HUB_OFFLINE" in os.environ:
        return False
    hub = request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")  # noqa: S310
    try:
        request.urlopen(hub, timeout=HUB_SECONDS).close()  # noqa: S310
    except error.HTTPError:
        return False  # it answers
    except OSError:
        return True
    return False


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
    from prmkit.prompts.encoding import load_encoding
    from prmkit.training.row_lengths import check_lengths, measure
    from prmkit.training.template_check import check_template

    model = str(values["model_name_or_path"])
    advice = STEPS["template"] if Path(model).is_dir() else f"Download the model first: hf download {model}"
    try:
        if not Path(model).is_dir() and not is_hub_name(model):
            advice = "Mend the model folder first."
            raise DataError(f"not known: there is no folder {model}")
        encoding = load_encoding(
            Path(model),
            values.get("template"),
            default_system=values.get("default_system"),
            enable_thinking=values.get("enable_thinking", True),
            trust_remote_code=bool(values.get("trust_remote_code")),
        )
    except (DataError, UsageError) as failure:
        done(error("template", str(failure), advice))
        done(warning("row lengths", "not measured, for want of a tokenizer", "Mend the model folder first."))
        return
    done(check_template(encoding, values))
    try:
        lengths = measure(encoding, values)
    except DataError as failure:
        done(warning("row lengths", f"not measured: {failure}", "Mend the dataset first."))
        return
    done(check_lengths(lengths, values), lengths.longest if lengths else None)


def _parse(values: Mapping[str, Any]) -> tuple[Check, Any]:
    """What LLaMA Factory's parser says, and the training arguments that it makes."""
    from llamafactory.hparams import get_train_args

    left_out = [key for key in NEEDS_TORCHRUN if key in values]
    kept = {key: value for key, value in values.items() if key not in left_out}
    # It refuses an output folder that holds an adapter, and looks for checkpoints: what a launch sees to by itself.
    fresh = str(Path(tempfile.gettempdir()) / f"prmkit-{os.getpid()}-is-never-made")
    _, _, arguments, _, _ = get_train_args({**kept, "output_dir": fresh, "resume_from_checkpoint": None})
    without = f" (without {', '.join(left_out)}, which it takes only under torchrun)" if left_out else ""
    return ok("LLaMA Factory's own parser", f"takes all {len(kept)} keys{without}"), arguments


def _trainer(arguments: Any) -> Check:
    """Make what transformers' trainer would make after the model has loaded: optimizer, schedule, loggers."""
    parts = {"optim": _make_optimizer, "lr_scheduler_type": _make_schedule, "report_to": _make_loggers}
    problems = []
    for key, make in parts.items():
        try:
            make(arguments)
        except (ImportError, ValueError, TypeError, RuntimeError, LookupError, AttributeError, OSError) as failure:
            problems.append(f"{key}: {next(iter(str(failure).splitlines()), repr(failure))}")
    if problems:
        return error("trainer", "; ".join(problems), STEPS["trainer"])
    names = (arguments.optim, arguments.lr_scheduler_type, *arguments.report_to)
    return ok("trainer", f"makes {', '.join(str(getattr(name, 'value', name)) for name in names)}")


def _make_optimizer(arguments: Any) -> None:
    import torch
    from transformers import Trainer

    # Those that want the names of the model's layers cannot be tried on another model.
    if not arguments.optim_target_modules:
        Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(1, 1))


def _make_schedule(arguments: Any) -> None:
    import torch
    from llamafactory.train.trainer_utils import create_custom_scheduler
    from transformers import get_scheduler

    steps = 100  # as good as any other number
    optimizer = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters(), lr=arguments.learning_rate)
    create_custom_scheduler(arguments, steps)
    get_scheduler(
        arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(steps), steps, arguments.lr_scheduler_kwargs
    )


def _make_loggers(arguments: Any) -> None:
    from transformers.integrations import get_reporting_integration_callbacks

    for logger in get_reporting_integration_callbacks(arguments.report_to):
        logger()


if __name__ == "__main__":
    main()
