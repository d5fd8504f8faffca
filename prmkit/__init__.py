"""prmkit: judged agent trajectories in, a process reward model out.

The public Python API; each function is imported on first use:

    prmkit.convert("my_rows.jsonl", "data")            finetune.jsonl -> datasets for LLaMA Factory; the report
    prmkit.load_judge("saves/my_run").score(prompts)   scores of steps; needs torch and transformers
    prmkit.read_verdict('{"score": 0.8}')              the scores in a judge's answer, or why it was rejected
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - before any import that an older Python cannot read
    sys.exit(
        f"error: prmkit needs Python 3.11 or newer; {sys.executable} is {sys.version_info[0]}.{sys.version_info[1]}. "
        "Run ./run_training.sh --install-deps, then activate the environment: source .venv/bin/activate"
    )

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prmkit.dataset import convert
    from prmkit.judge.scorer import load_judge
    from prmkit.verdict import read_verdict

__version__ = "0.1.0"
__all__ = ["convert", "load_judge", "read_verdict"]

_HOMES = {
    "convert": "prmkit.dataset",
    "load_judge": "prmkit.judge.scorer",
    "read_verdict": "prmkit.verdict",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prmkit' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
