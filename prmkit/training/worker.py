"""One of several processes that train together: LLaMA Factory, with a stop that all of them make at the same step.

    torchrun … -m prmkit.training.worker CONFIG.yaml

`enable_jit_checkpoint` saves on SIGTERM, but each process decides for itself at which step. Where two decide
differently, one waits in the saving and the other in the next step, for ever.
"""

import signal
from typing import Any


def main() -> None:
    """Train; SIGTERM to any of the processes, on any node, makes all of them save after the step at hand and stop."""
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

    run_exp(callbacks=[StopTogether()])


if __name__ == "__main__":
    main()
