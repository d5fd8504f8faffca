"""Check whether an exported model gives the same scores as the trained adapter, and look for causes if not."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmkit.errors import GateError
from prmkit.files import read_json
from prmkit.judge.sources import JudgeSource, read_object
from prmkit.judge.types import Judgement, Request, ScoringOptions
from prmkit.paths import EXPORT_NOTE
from prmkit.prompts.cleaning import escape

log = logging.getLogger("prmkit")

PARITY_PROMPTS = 8
"""The number of prompts to compare: a wrong template or dtype affects every prompt, so a few are enough."""
DEFAULT_TOLERANCE = 0.02
"""The largest allowed difference of a score: above the effect of bfloat16, far below that of a wrong template."""

_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_ROUNDING = 0.02
"""The largest relative difference between a weight and its half-precision copy, with some margin."""


@dataclass(frozen=True)
class Parity:
    """The differences between the scores of two judges on the same prompts."""

    prompts: int
    scores: int
    """The number of scores that both gave."""
    largest: float
    mean: float
    """Largest and mean absolute difference of these scores."""
    unequal: int
    """Prompts that only one of the two could score."""
    causes: tuple[str, ...]
    """The known causes of such differences that were found, the most likely first."""

    def __str__(self) -> str:
        counts = f"{self.scores} scores of {self.prompts} prompts: largest difference {self.largest:.4f}, "
        return f"{counts}mean {self.mean:.4f}" + (
            f"; {self.unequal} prompts got a score from only one of the two" * bool(self.unequal)
        )


@dataclass(frozen=True)
class _Side:
    """One model's answers, and the prompts as token ids."""

    judgements: list[Judgement]
    prompt_ids: list[list[int]]
    chat_ids: list[list[int]] | None
    """The prompts as rendered by the tokenizer's own chat template; None if it has none."""


def check_parity(
    trained: JudgeSource,
    exported: JudgeSource,
    requests: Sequence[Request],
    *,
    tolerance: float = DEFAULT_TOLERANCE,
    batch_size: int = 8,
) -> Parity:
    """Score the same prompts with the adapter on its base model and with the exported model.

    Args:
        trained: the training run's judge.
        exported: the exported judge.
        requests: held-out prompts; a few are enough.
        tolerance: the largest allowed difference between two scores.
        batch_size: prompts per batch.

    Returns:
        The differences, if they are within the tolerance.

    Raises:
        GateError: they are larger; the message lists the likely causes.
        DataError: one of the two cannot be loaded.
    """
    one, other = _ask(trained, requests, batch_size), _ask(exported, requests, batch_size)
    differences = list(_differences(one.judgements, other.judgements))
    unequal = sum(a.status != b.status for a, b in zip(one.judgements, other.judgements, strict=True))
    parity = Parity(
        prompts=len(requests),
        scores=len(differences),
        largest=max(differences, default=0.0),
        mean=sum(differences) / len(differences) if differences else 0.0,
        unequal=unequal,
        causes=tuple(_causes(trained, exported, one, other)),
    )
    if parity.largest > tolerance or unequal or not differences:
        name = trained.adapter or trained.model
        causes = "".join(f"\n  {number}. {cause}" for number, cause in enumerate(parity.causes, start=1))
        raise GateError(
            f"{exported.model}: scores differ from those of {name} ({parity}; allowed {tolerance:g})."
            + (f" Likely causes:{causes}" if causes else " None of the usual causes was found; export the run again.")
        )
    for cause in parity.causes:
        log.warning("%s: scores agree, but: %s", exported.model, cause)
    return parity


def _ask(source: JudgeSource, requests: Sequence[Request], batch_size: int) -> _Side:
    """Load a judge, score with it, and release it: both models together may not fit into memory."""
    from prmkit.judge.transformers_judge import load_model

    judge = load_model(source)
    prompts = [escape(request.prompt)[0] for request in requests]
    tokenizer = judge.encoding.tokenizer
    chat_ids = None
    if tokenizer.chat_template:
        chat_ids = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            for prompt in prompts
        ]
    prompt_ids = [judge.encoding.prompt_ids(prompt) for prompt in prompts]
    return _Side(list(judge.score(requests, ScoringOptions(batch_size=batch_size))), prompt_ids, chat_ids)


def _differences(one: Sequence[Judgement], other: Sequence[Judgement]) -> Iterator[float]:
    for left, right in zip(one, other, strict=True):
        for key in left.scores.keys() & right.scores.keys():
            yield abs(left.scores[key].mean - right.scores[key].mean)


# --- causes --------------------------------------------------------------------------------------------------------


def _causes(trained: JudgeSource, exported: JudgeSource, one: _Side, other: _Side) -> Iterator[str]:
    if one.prompt_ids != other.prompt_ids:
        yield from _causes_of_other_ids(trained, exported)
    yield from _causes_in_weights(trained, exported)
    dtype = _config_of(exported.model).get("dtype")
    if dtype and dtype != trained.trained_dtype:
        yield f"dtype: trained in {trained.trained_dtype}, exported in {dtype}. Export again (infer_dtype)."
    if other.chat_ids is not None and other.chat_ids != one.prompt_ids:
        yield (
            "chat template: the export's own template renders prompts differently from training, so chat endpoints "
            "and apply_chat_template give different scores. Use the completions endpoint with the training template."
        )


def _causes_of_other_ids(trained: JudgeSource, exported: JudgeSource) -> Iterator[str]:
    names = {"template": "template", "default_system": "system prompt", "enable_thinking": "thinking mode"}
    differing = [key for key in names if getattr(trained, key) != getattr(exported, key)]
    for key in differing:
        yield f"{names[key]}: trained with {getattr(trained, key)!r}, exported with {getattr(exported, key)!r}."
    if not differing:
        yield "tokenizer: the export's tokenizer produces different tokens than the base model's."


def _causes_in_weights(trained: JudgeSource, exported: JudgeSource) -> Iterator[str]:
    base, export = _config_of(trained.model), _config_of(exported.model)
    sizes = [key for key in _SIZES if base.get(key) != export.get(key)]
    if sizes:
        yield f"wrong base model: {', '.join(f'{key} {base.get(key)} became {export.get(key)}' for key in sizes)}."
    elif _norms_differ(trained.model, exported.model):
        yield f"wrong base model: layers that adapters never change differ from those of {trained.model}."
    if trained.adapter is None:
        return
    note = read_object(exported.model / EXPORT_NOTE) if (exported.model / EXPORT_NOTE).is_file() else {}
    if note.get("adapter") and Path(note["adapter"]).resolve() != trained.adapter.resolve():
        yield f"wrong adapter: exported from {note['adapter']}, compared with {trained.adapter}."
    elif _newest(trained.adapter, "adapter_model") > _newest(exported.model, "") > 0:
        yield f"old export: {trained.adapter} was trained further afterwards. Export again."


def _config_of(folder: Path) -> Mapping[str, Any]:
    config: dict[str, Any] = read_json(folder / "config.json")
    return {**config, "dtype": config.get("dtype") or config.get("torch_dtype")}


def _newest(folder: Path, prefix: str) -> float:
    return max((file.stat().st_mtime for file in folder.glob(f"{prefix}*.safetensors")), default=0.0)


def _norms_differ(base: Path, export: Path) -> bool:
    """Return whether the one-dimensional weights, which LoRA does not change, differ by more than rounding."""
    import torch

    exported = dict(_vectors(export))
    return any(
        name in exported and not torch.allclose(exported[name], vector, rtol=_ROUNDING, atol=_ROUNDING)
        for name, vector in _vectors(base)
        if name.endswith("norm.weight")
    )


def _vectors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if len(weights.get_slice(name).get_shape()) == 1:
                    yield name, weights.get_tensor(name).float()
