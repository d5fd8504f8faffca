"""Run LLaMA Factory as one of several training processes, with a stop that takes effect at the same step in all.

    torchrun … -m prmkit.training.worker CONFIG.yaml

`enable_jit_checkpoint` saves on SIGTERM, but each process decides for itself at which step. If two decide differently,
one waits while saving, the other waits in the next step, and neither ever ends.
"""

import atexit
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from prmkit.cli import relax_collector
from prmkit.training.supervisor import die_with_parent


def values_of(config: Path) -> dict[str, Any]:
    """Read the config; for a worker that torchrun has restarted, add the newest complete checkpoint to resume from.

    LLaMA Factory would use the newest one even if the dying worker left it half-written, and fail until no restart is
    left.
    """
    from prmkit.llamafactory_schema import read_yaml
    from prmkit.training.resume import newest_checkpoint

    values = read_yaml(config)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        newest = newest_checkpoint(Path(values["output_dir"]))
        values["resume_from_checkpoint"] = str(newest.folder) if newest else False
    return values


def announce_fsdp(values: Mapping[str, Any]) -> None:
    """Set the environment variables that accelerate's launcher sets for FSDP.

    LLaMA Factory and transformers read them while they load the model, long before the trainer reads `fsdp`. Without
    them, every process first loads the complete model onto its GPU.
    """
    from prmkit.files import read_json

    if not values.get("fsdp"):
        return
    settings = values.get("fsdp_config") or {}
    settings = read_json(Path(settings)) if isinstance(settings, str) else settings
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_VERSION"] = str(settings.get("version", 1))
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(settings.get("cpu_ram_efficient_loading", False)).lower()


def let_numbered_cpus_load() -> None:
    """Let `torch.load` load to `cpu:0`, where transformers puts the optimizer of several processes on a CPU.

    torch accepts only `cpu`, so without this no such run could be resumed.
    """
    import torch

    def restored(storage: Any, location: str) -> Any:
        return storage if location.startswith("cpu:") else None

    torch.serialization.register_package(90, lambda storage: None, restored)


def main() -> None:
    """Train; a SIGTERM to any process on any node makes all processes save after the current step and stop."""
    die_with_parent(os.getppid())
    relax_collector()
    values = values_of(Path(sys.argv[1]))
    announce_fsdp(values)
    let_numbered_cpus_load()
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    class StopTogether(TrainerCallback):  # type: ignore[misc]
        """Checks after every step whether any process was asked to stop."""

        stop_requested = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            def note(_signal: int, _frame: object) -> None:
                self.stop_requested = True

            signal.signal(signal.SIGTERM, note)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            import torch
            import torch.distributed as together

            stop = torch.tensor(int(self.stop_requested), device=args.device)
            if together.is_initialized():
                together.all_reduce(stop, together.ReduceOp.MAX)
            if stop.item():
                control.should_save = control.should_training_stop = True

    run_exp(values, callbacks=[StopTogether()])
    leave()


def leave() -> NoReturn:
    """End the process without the destructors of C++ libraries.

    If one of their threads is still running, they abort (`terminate called without an active exception`). This happens
    on busy machines, and torchrun then mistakes the finished run for a failed one.
    """
    import torch.distributed as together

    if together.is_initialized():
        together.destroy_process_group()
    atexit._run_exitfuncs()  # SwanLab's, for example
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
