"""Make the files of an export readable by transformers 4 and 5.

LLaMA Factory saves with transformers 5, but people also serve with transformers 4 (vLLM, TGI, other projects). Version
4 either rejects what version 5 writes, or silently misreads it:

- `extra_special_tokens` as a list, and the tokenizer class `TokenizersBackend`: it cannot load the tokenizer;
- `rope_parameters`: it uses the architecture's default `rope_theta`, 10,000 instead of Qwen2.5's 1,000,000, and every
  number is wrong;
- `dtype`: it loads weights in float32.

Each of these has an older spelling that both versions read, which is written next to or instead of the new one.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prmkit.errors import LlamaFactoryError
from prmkit.files import read_json, write_json

TRIED_WITH = ("transformers 4.55.4 with tokenizers 0.21.4", "transformers 5.6.0 with tokenizers 0.22.2")
"""Versions in which exports gave the same token ids and numbers: `tools/check_export_transformers4.sh`."""

_OF_THIS_MACHINE = ("backend", "is_local", "local_files_only")
_NOT_SAMPLING = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
_PROBES = (
    "Judge this step.",
    '  {"a": [1.5]}\n\n```py\nx\n```\n步骤 état',
    "<|im_end|></s><eos><think>",
    "\t 12,345  ½",
)


def make_portable(folder: Path, stop_ids: list[int], *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Rewrite the configuration files of an exported model, and check that its tokenizer is unchanged.

    Args:
        folder: the exported model.
        stop_ids: the token ids that end an answer.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        What was corrected and what was checked, for the export note (prmkit.json).

    Raises:
        LlamaFactoryError: the tokenizer would encode the same text differently.
    """
    import tokenizers
    import transformers

    before = _token_ids(folder, trust_remote_code)
    corrected = [
        *_correct(folder / "tokenizer_config.json", _portable_tokenizer),
        *_correct(folder / "config.json", lambda config: _portable_config(config, folder)),
        *_correct(folder / "generation_config.json", lambda config: _without_sampling(config, stop_ids)),
    ]
    if _token_ids(folder, trust_remote_code) != before:
        raise LlamaFactoryError(
            f"{folder}: its tokenizer_config.json cannot be converted for transformers 4 without changing its token "
            "ids, so the model was not exported."
        )
    versions = f"transformers {transformers.__version__} with tokenizers {tokenizers.__version__}"
    return {"corrected": corrected, "checked_here": f"token ids, by {versions}", "format_tried_with": [*TRIED_WITH]}


def _correct(path: Path, rewrite: Any) -> Iterator[str]:
    """Rewrite a JSON file; yield the keys that changed."""
    old = read_json(path) if path.is_file() else {}
    new = rewrite(old)
    if new != old:
        write_json(path, new)
    yield from (f"{path.name}: {key}" for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key))


def _token_ids(folder: Path, trust_remote_code: bool) -> list[Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    texts = (*_PROBES, *map(str, tokenizer.all_special_tokens))
    return [sorted(tokenizer.all_special_ids), *(tokenizer(text)["input_ids"] for text in texts)]


def _portable_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    portable = {key: value for key, value in config.items() if key not in _OF_THIS_MACHINE}
    if isinstance(portable.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    if portable.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
    return portable


def _without_sampling(config: Mapping[str, Any], stop_ids: list[int]) -> dict[str, Any]:
    """Remove sampling settings, which servers use as defaults: a repetition penalty changes the digits of a verdict."""
    kept = {key: config[key] for key in _NOT_SAMPLING if config.get(key) is not None}
    ends = kept.get("eos_token_id", [])
    ends = [ends] if isinstance(ends, int) else list(ends)
    ends = list(dict.fromkeys((*ends, *stop_ids)))
    return {**kept, "eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else kept


def _portable_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    portable = dict(config)
    if isinstance(portable.get("text_config"), dict):
        portable["text_config"] = _portable_rope(portable["text_config"])
    portable = _portable_rope(portable)
    return portable | _facts_of_weights(portable, folder)


def _portable_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    portable = dict(config)
    if dtype := portable.get("dtype"):
        portable.setdefault("torch_dtype", dtype)
    rope = portable.get("rope_parameters")
    if not isinstance(rope, dict):
        return portable
    if isinstance(rope.get("full_attention"), dict):  # Gemma 3: one rope_theta per type of layer
        if isinstance(local := rope.get("sliding_attention"), dict) and "rope_theta" in local:
            portable.setdefault("rope_local_base_freq", local["rope_theta"])
        rope = rope["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            portable.setdefault(key, rope[key])
    if rope.get("rope_type", "default") != "default":
        portable.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    return portable


def _facts_of_weights(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Read from the weights the vocabulary's size, and whether input and output embeddings are tied.

    The base model's config may no longer be true: training the embeddings separates tied ones, and new tokens add rows.
    A loader that follows such a config would discard the trained output embedding.
    """
    tensors = _embeddings(folder)
    embedding, head = tensors.get("embed_tokens.weight"), tensors.get("lm_head.weight")
    facts: dict[str, Any] = {}
    if embedding is not None and isinstance(config.get("vocab_size"), int):
        facts["vocab_size"] = int(embedding.shape[0])
    if embedding is not None and head is not None and config.get("tie_word_embeddings", True):
        facts["tie_word_embeddings"] = bool(embedding.shape == head.shape and embedding.equal(head))
    return facts


def _embeddings(folder: Path) -> dict[str, Any]:
    from safetensors import safe_open

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if (kind := ".".join(name.split(".")[-2:])) in ("embed_tokens.weight", "lm_head.weight"):
                    tensors[kind] = weights.get_tensor(name)
    return tensors
