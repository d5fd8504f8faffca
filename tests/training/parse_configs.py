"""What the installed LLaMA Factory says, in one process of its own: its imports alone take 8 seconds.

    python parse_configs.py FOLDER_FOR_OUTPUT CONFIG...

Prints JSON: the fields of its dataclasses, its templates, and for each config the keys that were read, or its error.
"""

import json
import sys
from dataclasses import MISSING, fields
from typing import Any

ADAPTED = {"use_cpu": "true", "tf32": "null", "deepspeed": "null", "ddp_backend": "null"}
"""What its parser refuses on a machine without GPU, or without torchrun, which are the machines that run tests."""


def main() -> None:
    """Parse every config as `llamafactory-cli train CONFIG key=value…` does."""
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import parser
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    output, *configs = sys.argv[1:]
    known = {field.name: _default(field) for each in parser._TRAIN_ARGS for field in fields(each) if field.init}
    parsed = {}
    for config in configs:
        adapted = [f"{key}={value}" for key, value in ADAPTED.items()]
        sys.argv = ["llamafactory-cli", config, f"output_dir={output}", *adapted]
        try:
            model, data, training, finetuning, _ = parser.get_train_args()
        except (ValueError, TypeError, AssertionError, ImportError, OSError) as error:
            parsed[config] = {"error": f"{type(error).__name__}: {error}"}
            continue
        parsed[config] = {
            "dataset": data.dataset,
            "model": model.model_name_or_path,
            "bf16": training.bf16,
            "finetuning_type": finetuning.finetuning_type,
            "learning_rate": training.learning_rate,
            "eval_strategy": str(training.eval_strategy.value),
        }
    loggers = list(INTEGRATION_TO_CALLBACK)
    sys.stdout.write(
        "\n" + json.dumps({"keys": known, "templates": list(TEMPLATES), "loggers": loggers, "parsed": parsed})
    )


def _default(field: Any) -> Any:
    if field.default is MISSING:
        return "no default"
    plain = field.default is None or isinstance(field.default, bool | int | float | str)
    return field.default if plain else str(field.default)


if __name__ == "__main__":
    main()
