"""finetune.jsonl -> data/: judged rows become datasets for LLaMA Factory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def convert(
    input: str | Path | Sequence[str | Path],
    output_dir: str | Path = "data",
    *,
    config: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Convert judged rows, as `convert_dataset.py` does.

    >>> report = convert("finetune.jsonl", "data", evaluation_types=["clip"], eval_ratio=0.2)  # doctest: +SKIP

    Args:
        input: files or folders of rows.
        output_dir: the folder that LLaMA Factory reads.
        config: a training configuration with the settings of the length check.
        options: the script's other flags, with `_` for `-`.

    Returns:
        The report, as in conversion_report.json.

    Raises:
        DataError: the rows cannot be used.
        UsageError: an option does not exist, or contradicts another.
    """
    from prmkit.dataset.command import arguments_of, settings_of
    from prmkit.dataset.conversion import convert as run

    inputs = [input] if isinstance(input, str | Path) else list(input)
    given = {"input": [str(name) for name in inputs], "output_dir": Path(output_dir)}
    return run(settings_of(arguments_of({**given, "config": config and Path(config), **options})))
