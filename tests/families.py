"""Tiny random judges of five model families, saved and loaded as any downloaded model is."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEMPLATES = {"qwen": "qwen", "llama3": "llama3", "mistral": "mistral", "gemma2": "gemma2", "melting": "mistral"}
"""LLaMA Factory's template by family. Each family has its way of tokenising numbers and of attending.

qwen: byte-level BPE, every digit a token; full attention.
llama3: byte-level BPE, up to three digits a token; full attention with grouped heads.
mistral: BPE with byte fallback, every digit a token; sliding window.
gemma2: Unigram, numbers in pieces of any length; alternating sliding and full attention, capped scores, eager.
melting: BPE without any splitting, so digits merge with points, spaces and commas. No such model is known.
"""

STEPS = (
    "The agent searched the web for the opening match and read the first page.",
    "It opened the file, found nothing, and called the same tool again.",
    "Das Ergebnis war leer; der Agent hat geraten.",
    "The code raised an error. The agent fixed the import and ran it once more.",
)

_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 2048,
    # Large, so that the scores of a random model differ from prompt to prompt.
    "initializer_range": 0.3,
}


@dataclass(frozen=True)
class Family:
    """What is needed to build a model of one family."""

    tokenizer: Callable[[], Any]
    special: dict[str, str]
    more_special: tuple[str, ...]
    model: Callable[[int, dict[str, int]], Any]


def prompt(step: str, schema: str) -> str:
    """A prompt that asks for a verdict on a step."""
    return f"Task Description: find it.\n\nCurrent Clip (Clip 1):\nContent:\n{step}\n\nAnswer in JSON:\n{schema}\n"


FLAT = '{\n    "reasonableness_score": 0.85,\n    "summary": "what was done"\n}'
NESTED = (
    '{\n    "scores": {\n        "relevance": 0.8,\n        "use_of_tools": 0.9,\n        "progress": 0.7\n    }\n}'
)


def prompts() -> list[str]:
    """Prompts of different lengths and both shapes, one of them twice."""
    some = [prompt(" ".join(STEPS[: 1 + i % 4] * (1 + i // 3)), NESTED if i % 3 == 1 else FLAT) for i in range(7)]
    return [*some, some[2]]


def _corpus() -> list[str]:
    labels = [f'{{"reasonableness_score": {i / 100:.2f}, "summary": "well done"}}' for i in range(0, 101, 5)]
    nested = [f'{{"scores": {{"relevance": {i / 100:.2f}, "progress": 0.90}}}}' for i in range(0, 101, 5)]
    return [*prompts(), *STEPS * 5, *labels * 6, *nested * 6, "1 12 123 95 100 0.95 0,95 95 95"]


def _byte_level(digits: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pattern = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=460, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _byte_fallback(*, split_digits: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if split_digits:
        tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, max_token_length=6, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _unigram() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Digits()
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.UnigramTrainer(
        vocab_size=420, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


def _qwen(vocabulary: int, sizes: dict[str, Any]) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = sizes | {"initializer_range": 0.05}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=False, **sizes))


def _llama(vocabulary: int, sizes: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))


def _mistral(vocabulary: int, sizes: dict[str, Any]) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(vocab_size=vocabulary, sliding_window=24, **sizes))


def _gemma2(vocabulary: int, sizes: dict[str, Any]) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(vocab_size=vocabulary, sliding_window=24, query_pre_attn_scalar=12, **sizes))


_LLAMA2_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

_FAMILIES = {
    "qwen": Family(
        lambda: _byte_level(r"\p{N}"),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_start|>",),
        _qwen,
    ),
    "llama3": Family(
        lambda: _byte_level(r"\p{N}{1,3}"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|eot_id|>"},
        ("<|start_header_id|>", "<|end_header_id|>"),
        _llama,
    ),
    "mistral": Family(lambda: _byte_fallback(split_digits=True), _LLAMA2_SPECIAL, (), _mistral),
    "melting": Family(lambda: _byte_fallback(split_digits=False), _LLAMA2_SPECIAL, (), _mistral),
    "gemma2": Family(
        _unigram,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ("<start_of_turn>", "<end_of_turn>"),
        _gemma2,
    ),
}


def build(name: str, folder: Path) -> Path:
    """Save a tiny model of a family into `folder`."""
    import torch
    from transformers import PreTrainedTokenizerFast

    family = _FAMILIES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=family.tokenizer(), extra_special_tokens=list(family.more_special), **family.special
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = family.model(len(tokenizer), _SIZES)
        if name == "qwen":
            _teach(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _teach(model: Any, tokenizer: Any) -> None:
    """Teach a model to answer with verdicts, so that one family has a high label mass."""
    import torch

    values = ("0.90", "0.85", "0.40", "1.00", "0.15")
    texts = []
    for turn, text in enumerate(prompts()[:-1]):
        keys = re.findall(r'"(\w+)": 0', text)
        scores = ", ".join(f'"{key}": {values[(turn + place) % 5]}' for place, key in enumerate(keys))
        answer = f'{{"scores": {{{scores}}}, "summary": "x"}}' if len(keys) > 1 else f'{{{scores}, "summary": "x"}}'
        texts.append(f"{text}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n")
    ids = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    marks = ids.input_ids.clone()
    marks[:, :-60] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = model(**ids, labels=marks).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
