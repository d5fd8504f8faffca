"""One of several processes that train together: LLaMA Factory, with a stop that all of them make at the same step.

    torchrun … -m prmkit.training.worker CONFIG.yaml

`enable_jit_checkpoint` saves on SIGTERM, but each process decides for itself at which step. Where two decide
differently, one waits in the saving and the other in the next step, for ever.
"""

import atexit
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn


def values_of(config: Path) -> dict[str, Any]:
    """The config; of a worker that torchrun has started again, with the newest whole checkpoint to go on from.

    LLaMA Factory would take the newest one, which the death of the worker may have left half-written, and die of it
    until no restart is left.
    """
    from prmkit.config_file import read_yaml
    from prmkit.training.checkpoints import newest_whole

    values = read_yaml(config)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        newest = newest_whole(Path(values["output_dir"]), put_aside=False)
        values["resume_from_checkpoint"] = str(newest.folder) if newest else False
    return values


def announce_fsdp(values: Mapping[str, Any]) -> None:
    """Say in the environment that the weights are to be divided, as accelerate's launcher does.

    LLaMA Factory and transformers look there while they load the model, long before the trainer reads `fsdp`. Without
    it every process first puts the whole model on its GPU.
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
    """Let `torch.load` read to `cpu:0`, where transformers puts the optimizer of several processes on a CPU.

    torch knows the place `cpu` alone, so without this no such run could go on from a checkpoint.
    """
    import torch

    def restored(storage: Any, location: str) -> Any:
        return storage if location.startswith("cpu:") else None

    torch.serialization.register_package(90, lambda storage: None, restored)


def main() -> None:
    """Train; SIGTERM to any of the processes, on any node, makes all of them save after the step at hand and stop."""
    values = values_of(Path(sys.argv[1]))
    announce_fsdp(values)
    let_numbered_cpus_load()
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    class StopTogether(TrainerCallback):  # type: ignore[misc]
        """Asks after every step whether any process was told to stop."""

        told = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            def note(_signal: int, _frame: object) -> None:
                self.told = True

            signal.signal(signal.SIGTERM, note)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            import torch
            import torch.distributed as together

            told = torch.tensor(int(self.told), device=args.device)
            if together.is_initialized():
                together.all_reduce(told, together.ReduceOp.MAX)
            if told.item():
                control.should_save = control.should_training_stop = True

    run_exp(values, callbacks=[StopTogether()])
    leave()


def leave() -> NoReturn:
    """End the process without the destructors of C++ libraries.

    Where one of their threads is still running they abort (`terminate called without an active exception`), which a
    busy machine shows now and then, and torchrun takes the run that is finished for one that failed.
    """
    import torch.distributed as together

    if together.is_initialized():
        together.destroy_process_group()
    atexit._run_exitfuncs()  # SwanLab's, for one
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
