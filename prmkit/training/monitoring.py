"""Watching a run: `logs/trainer_log.jsonl`, the progress on the terminal, the curves."""

import fcntl
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from prmkit import cli
from prmkit.training.checkpoints import read_log

log = logging.getLogger(__name__)

QUIET_SECONDS = 30
"""At least so long apart stand two lines of progress where nobody sits at a terminal."""


@dataclass(frozen=True)
class Start:
    """Where a launch begins: at 0, or at the checkpoint that it goes on from."""

    step: int = 0
    tokens: int = 0


def corrected(entry: Mapping[str, Any], start: Start) -> dict[str, Any]:
    """One entry of LLaMA Factory's trainer log, with time left and throughput right after a resume too.

    LLaMA Factory divides the time of this launch by the steps and tokens of all launches. What is corrected:
    `remaining_time` and `throughput` (tokens per second, of this launch).
    """
    fixed = dict(entry)
    done = entry["current_steps"] - start.step
    seconds = _elapsed(entry)
    if done > 0 and "total_steps" in entry:
        left = max(entry["total_steps"] - entry["current_steps"], 0) * seconds / done
        fixed["remaining_time"] = str(timedelta(seconds=round(left)))
    if "total_tokens" in entry and seconds > 0:
        fixed["throughput"] = round((entry["total_tokens"] - start.tokens) / seconds, 2)
    return fixed


def _elapsed(entry: Mapping[str, Any]) -> float:
    """Seconds since this launch began to train; to the hundredth where tokens are counted, else whole ones."""
    if entry.get("throughput"):
        return float(entry["total_tokens"] / entry["throughput"])
    days, _, clock = str(entry.get("elapsed_time", "0:00:00")).rpartition(" day")
    hours, minutes, seconds = clock.split()[-1].split(":")
    return int(days or 0) * 86400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def seconds_a_step(entry: Mapping[str, Any], start: Start) -> float:
    """How long a step has taken on average since this launch began; 0 before the first one ended."""
    done = entry["current_steps"] - start.step
    return _elapsed(entry) / done if done > 0 else 0.0


@dataclass
class Follower:
    """Copies a run's trainer log to where it can be followed from before the first step, entry by entry."""

    source: Path
    """LLaMA Factory's `trainer_log.jsonl` in the run folder."""
    target: IO[bytes] | None
    start: Start
    position: int = 0
    """How many bytes of `source` have been read."""
    rest: bytes = field(default=b"")
    """The beginning of a line that was not yet whole."""

    def new_entries(self) -> list[dict[str, Any]]:
        """The entries that came since the last call, corrected, and copied to `target`."""
        if not self.source.exists():
            return []
        if self.source.stat().st_size < self.position:
            self.position, self.rest = 0, b""  # begun anew
        with self.source.open("rb") as stream:
            stream.seek(self.position)
            read = stream.read()
        self.position += len(read)
        *lines, self.rest = (self.rest + read).split(b"\n")
        entries = [corrected(json.loads(line), self.start) for line in lines if line]
        if self.target and entries:
            self.target.write(_as_lines(entries))
            self.target.flush()
        return entries


@contextmanager
def followed(source: Path, target: Path, start: Start) -> Iterator[Follower]:
    """Let `target` follow the trainer log of the run that starts now.

    What an earlier launch of the same run logged, up to where this one goes on, stands in it from the beginning. The
    file stays the same file, so a `tail -f` that began before goes on. While another run is followed there, `target`
    is left alone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    position = source.stat().st_size if source.exists() else 0
    with target.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s follows another run; this one is in %s", target, source)
            yield Follower(source, None, start, position)
            return
        stream.truncate(0)
        stream.write(_as_lines([entry for entry in read_log(source) if entry["current_steps"] <= start.step]))
        stream.flush()
        yield Follower(source, stream, start, position)


def _as_lines(entries: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


# --- on the terminal ----------------------------------------------------------------------------------------------


@contextmanager
def progress(name: str, start: Start) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show a run's entries as they come: as a bar on a terminal, else as a line now and then."""
    with cli.progress_bar() as bar:
        task = bar.add_task(f"{name}: starting LLaMA Factory", total=None, completed=start.step)
        last_line = -math.inf

        def show(entry: Mapping[str, Any]) -> None:
            nonlocal last_line
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
    """Loss, learning rate, tokens a second and GPU memory, as far as an entry has them."""
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
    """Give a function that shows on stderr what a log has gained since the last call, from byte `begin` on."""
    with log_path.open("rb") as stream:
        stream.seek(begin)

        def show() -> None:
            if text := stream.read().decode(errors="replace").strip("\n"):
                log.info("%s", text)

        yield show
        show()


# --- curves -------------------------------------------------------------------------------------------------------

# Okabe and Ito's blue and vermilion, which every kind of colour vision tells apart; the marks differ as well.
_TRAIN_COLOUR, _HELD_OUT_COLOUR = "#0072B2", "#D55E00"


def curves(history: list[dict[str, Any]]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Training and held-out losses by step, out of a trainer state's `log_history`."""
    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    return train, list(dict(held_out).items())


def draw_curves(history: list[dict[str, Any]], name: str, target: Path) -> bool:
    """Draw both losses into one picture.

    Returns:
        Whether there was anything to draw.
    """
    train, held_out = curves(history)
    if not train and not held_out:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color=_TRAIN_COLOUR, linewidth=1.5, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=_HELD_OUT_COLOUR, marker="o", markersize=5, label="held-out")
    axes.set(title=name, xlabel="step", ylabel="loss (nats per token)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target)
    return True
