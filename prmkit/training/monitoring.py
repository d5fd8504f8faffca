"""Monitor a training run: trainer log, progress, output, loss curves, final measurements, SwanLab.

Contacting SwanLab's server takes at most two seconds.
"""

import fcntl
import json
import logging
import math
import netrc
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from prmkit import cli
from prmkit.llamafactory_schema import setting
from prmkit.training.checkpoints import parse_log_line, read_log
from prmkit.training.checks import Check, ok, warning

log = logging.getLogger(__name__)

QUIET_SECONDS = 30
"""Minimum seconds between progress lines when stderr is not a terminal."""
SILENT_SECONDS = 60
"""Seconds without output after which a line says that the run is alive, when stderr is not a terminal."""


@dataclass(frozen=True)
class ResumedAt:
    """The step and tokens at which a launch begins: 0, or those of the checkpoint from which it resumes."""

    step: int = 0
    tokens: int = 0


def corrected(entry: Mapping[str, Any], resumed_at: ResumedAt) -> dict[str, Any]:
    """Correct the time left and the throughput in an entry of LLaMA Factory's trainer log after a resume.

    LLaMA Factory divides the time of this launch by the steps and tokens of all launches. `remaining_time` and
    `throughput` (tokens per second, of this launch) are corrected.
    """
    fixed = dict(entry)
    done = entry["current_steps"] - resumed_at.step
    seconds = _elapsed(entry)
    if done > 0 and "total_steps" in entry:
        left = max(entry["total_steps"] - entry["current_steps"], 0) * seconds / done
        fixed["remaining_time"] = str(timedelta(seconds=round(left)))
    if "total_tokens" in entry and seconds > 0:
        fixed["throughput"] = round((entry["total_tokens"] - resumed_at.tokens) / seconds, 2)
    return fixed


def _elapsed(entry: Mapping[str, Any]) -> float:
    """Return the seconds since this launch began to train: hundredths if tokens are counted, otherwise full seconds."""
    if entry.get("throughput") and "total_tokens" in entry:
        return float(entry["total_tokens"] / entry["throughput"])
    days, _, clock = str(entry.get("elapsed_time", "0:00:00")).rpartition(" day")
    try:
        hours, minutes, seconds = clock.split()[-1].split(":")
        return int(days or 0) * 86400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except (ValueError, IndexError):
        return 0.0


def seconds_a_step(entry: Mapping[str, Any], resumed_at: ResumedAt) -> float:
    """Return the average seconds per step since this launch began; 0 before its first step ends."""
    done = entry["current_steps"] - resumed_at.step
    return _elapsed(entry) / done if done > 0 else 0.0


@dataclass
class Follower:
    """Copies a run's trainer log, entry by entry, to a file that `tail -f` can follow from before the first step."""

    source: Path
    """LLaMA Factory's `trainer_log.jsonl` in the run folder."""
    target: IO[bytes] | None
    resumed_at: ResumedAt
    position: int = 0
    """The number of bytes of `source` that have been read."""
    rest: bytes = field(default=b"")
    """The beginning of an incomplete line."""

    def new_entries(self) -> list[dict[str, Any]]:
        """Return the corrected entries since the last call, and copy them to `target`; damaged lines are skipped."""
        if not self.source.exists():
            return []
        if self.source.stat().st_size < self.position:
            self.position, self.rest = 0, b""  # the file was written again from the beginning
        with self.source.open("rb") as stream:
            stream.seek(self.position)
            read = stream.read()
        self.position += len(read)
        *lines, self.rest = (self.rest + read).split(b"\n")
        entries = [corrected(entry, self.resumed_at) for line in lines if (entry := parse_log_line(line)) is not None]
        if self.target and entries:
            self.target.write(_as_lines(entries))
            self.target.flush()
        return entries


@contextmanager
def followed(source: Path, target: Path, resumed_at: ResumedAt) -> Iterator[Follower]:
    """Let `target` follow the trainer log of the run that starts now.

    It begins with the entries of earlier launches of the same run, up to the step where this one resumes. The file is
    emptied rather than replaced, so that `tail -f` continues. While `target` follows another run, it is not touched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    position = source.stat().st_size if source.exists() else 0
    with target.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s follows another run; this one is in %s", target, source)
            yield Follower(source, None, resumed_at, position)
            return
        stream.truncate(0)
        stream.write(_as_lines([entry for entry in read_log(source) if entry["current_steps"] <= resumed_at.step]))
        stream.flush()
        yield Follower(source, stream, resumed_at, position)


def _as_lines(entries: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


@contextmanager
def progress(name: str, resumed_at: ResumedAt) -> Iterator[Callable[[Mapping[str, Any] | None], None]]:
    """Show a run's entries as they come: as a bar on a terminal, otherwise as occasional lines.

    Yields:
        A function to call with every entry, and regularly with None, so that it can explain a long silence.
    """
    with cli.progress_bar() as bar:
        task = bar.add_task(f"{name}: starting LLaMA Factory", total=None, completed=resumed_at.step)
        last_line, last_sign = -math.inf, time.monotonic()

        def show(entry: Mapping[str, Any] | None) -> None:
            nonlocal last_line, last_sign
            if entry is None:
                if bar.disable and time.monotonic() - max(last_line, last_sign) > SILENT_SECONDS:
                    last_sign = time.monotonic()
                    log.info("%s: still running; progress is reported every logging_steps steps", name)
                return
            total, step = entry.get("total_steps"), entry["current_steps"]
            if not {"loss", "eval_loss"} & entry.keys():
                return  # the last entry is a summary
            bar.update(task, total=total, completed=step, description=f"{name}: {summary(entry)}".rstrip(": "))
            if bar.disable and (time.monotonic() - last_line > QUIET_SECONDS or step == total):
                last_line = time.monotonic()
                left = f", {entry['remaining_time']} left" if "remaining_time" in entry else ""
                log.info("step %s of %s: %s%s", step, total, summary(entry), left)

        yield show


def summary(entry: Mapping[str, Any]) -> str:
    """Format an entry's loss, learning rate, tokens per second and GPU memory, if it has them."""
    parts = [
        f"loss {entry['loss']:.4f}" if "loss" in entry else "",
        f"held-out loss {entry['eval_loss']:.4f}" if "eval_loss" in entry else "",
        f"lr {entry['lr']:.1e}" if "lr" in entry else "",
        f"{entry['throughput']:,.0f} tokens/s" if entry.get("throughput") else "",
        f"{entry['vram_reserved']:.1f} GiB" if entry.get("vram_reserved") else "",
    ]
    return "  ".join(filter(None, parts))


@contextmanager
def echoed(log_path: Path, begin: int) -> Iterator[Callable[[], None]]:
    """Yield a function that prints to stderr what was added to a log since the last call, starting at byte `begin`."""
    with log_path.open("rb") as stream:
        stream.seek(begin)

        def show() -> None:
            if text := stream.read().decode(errors="replace").strip("\n"):
                log.info("%s", text)

        yield show
        show()


# --- final measurements -------------------------------------------------------------------------------------------


def reached(
    state: Mapping[str, Any], logged: Sequence[Mapping[str, Any]], final_loss: float | None
) -> dict[str, float | None]:
    """Return the fields of run.json that are known at the end of a run: steps, tokens, losses, memory.

    `train_loss` is the last one logged, a mean over `logging_steps` steps, because LLaMA Factory's own `train_loss`
    (the mean over the run) is wrong after every resume. `eval_loss` is that of the final weights, if they were
    evaluated.

    Args:
        state: the newest `trainer_state.json`; empty for a run that has saved nothing.
        logged: the lines of `trainer_log.jsonl`.
        final_loss: the held-out loss of the final weights.
    """
    train, held_out = curves(state.get("log_history", []))
    memory = max((line.get("vram_reserved", 0.0) for line in logged), default=0.0)
    totals = [line["total_steps"] for line in logged if "total_steps" in line]
    return {
        "steps": state.get("global_step", 0),
        "max_steps": state.get("max_steps") or (totals[-1] if totals else None),
        "tokens": state.get("num_input_tokens_seen") or None,
        "train_loss": _finite(train[-1][1] if train else None),
        "eval_loss": _finite(final_loss if final_loss is not None else held_out[-1][1] if held_out else None),
        "peak_gpu_memory_gib": memory if memory > 0 else None,
    }


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


# --- curves -------------------------------------------------------------------------------------------------------

# Okabe and Ito's blue and vermilion, which remain distinct under every kind of colour vision; the markers differ, too.
_TRAIN_COLOUR, _HELD_OUT_COLOUR = "#0072B2", "#D55E00"


def curves(history: list[dict[str, Any]]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return training and held-out losses by step, from a trainer state's `log_history`."""
    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    return train, list(dict(held_out).items())


def draw_curves(history: list[dict[str, Any]], name: str, target: Path) -> bool:
    """Plot both losses on a logarithmic axis, so that later steps are not one flat line.

    Returns:
        Whether there was anything to plot.
    """
    train, held_out = (
        [(step, loss) for step, loss in curve if math.isfinite(loss) and 0 < loss < 1e30] for curve in curves(history)
    )
    if not train and not held_out:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for curve, colour, marker, label in (
        (train, _TRAIN_COLOUR, "o" if len(train) < 2 else None, "training"),
        (held_out, _HELD_OUT_COLOUR, "o", "held-out"),
    ):
        if curve:
            axes.plot(*zip(*curve, strict=True), color=colour, marker=marker, markersize=5, linewidth=1.5, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axes.set_title(name, parse_math=False)  # otherwise `$$` in a run's name would be read as a formula
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(ScalarFormatter())
    axes.grid(color="#dddddd", linewidth=0.6, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target)
    return True


# --- where SwanLab can record a run -------------------------------------------------------------------------------

# LLaMA Factory contacts SwanLab only after the model has loaded, and fails if it cannot.
_SWANLAB_HOST = "https://api.swanlab.cn"
_CONNECT_SECONDS = 2.0


def resolve_swanlab(
    values: Mapping[str, Any], packages: Mapping[str, str], environment: Mapping[str, str] | None = None
) -> tuple[str | None, str]:
    """Choose where SwanLab records the run.

    Args:
        values: LLaMA Factory's keys; `use_swanlab` is true.
        packages: installed versions by name; `swanlab` and `swanboard` are used.
        environment: None for the process's environment.

    Returns:
        A value of `swanlab_mode`, or None to turn SwanLab off; and why.
    """
    environment = os.environ if environment is None else environment
    requested: str | None = values.get("swanlab_mode")
    if "swanlab" not in packages:
        return None, "swanlab is not installed"
    if requested in ("offline", "disabled", "local") and (requested != "local" or "swanboard" in packages):
        return requested, "as configured"
    reason = "its dashboard is not installed" if requested == "local" else _why_not_cloud(environment)
    if reason is None:
        return "cloud", "logged in"
    if requested != "local" and "swanboard" in packages:
        return "local", f"{reason}; show the run with: swanlab watch"
    # A local run recorded without swanboard can never be shown, not even after it is installed.
    return None, f"{reason}; for local runs: pip install 'swanlab[dashboard]'"


def _why_not_cloud(environment: Mapping[str, str]) -> str | None:
    host = _host_of_login(environment)
    if host is None:
        return "not logged in to SwanLab"
    address = urlsplit(host if "//" in host else f"//{host}")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return f"{host} cannot be reached"
    return None


def _host_of_login(environment: Mapping[str, str]) -> str | None:
    """Return the server of the current login, from the environment, this folder or the home folder."""
    host = environment.get("SWANLAB_API_HOST")
    if environment.get("SWANLAB_API_KEY"):
        return host or _SWANLAB_HOST
    home = environment.get("SWANLAB_ROOT") or environment.get("SWANLAB_SAVE_DIR") or str(Path.home() / ".swanlab")
    for folder in (Path(".swanlab"), Path(home)):
        try:
            hosts = netrc.netrc(folder / ".netrc").hosts
        except (OSError, netrc.NetrcParseError):
            continue
        for machine, (_login, _account, password) in hosts.items():
            if password:
                return host or machine
    return None


def check_swanlab(values: Mapping[str, Any], dropped: Mapping[str, str], sources: Mapping[str, str]) -> Check:
    """Report where SwanLab records the run, which was decided when the config was resolved."""
    if "use_swanlab" in dropped:
        reason, _, advice = dropped["use_swanlab"].partition("; ")
        return warning("SwanLab", f"off: {reason}", advice.capitalize())
    if not values.get("use_swanlab"):
        return ok("SwanLab", "off")
    mode = setting(values, "swanlab_mode")
    reason = sources.get("swanlab_mode", "")
    why = f" ({reason.removeprefix('derived: ')})" if reason.startswith("derived") else ""
    return ok("SwanLab", f"{mode}, project {setting(values, 'swanlab_project')}{why}")
