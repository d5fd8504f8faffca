"""The models and words that several benchmarks use."""

from pathlib import Path
from typing import Any

# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1e6,
    "tie_word_embeddings": False,
}  # fmt: skip

WORDS = (
    "agent", "searched", "result", "page", "table", "answer", "evidence", "step", "tool", "call", "returned", "season",
)  # fmt: skip
"""The words of synthetic prompts."""


def random_qwen_7b(device: str) -> Any:
    """Return Qwen2.5-7B with random weights in bfloat16, in evaluation mode."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen2ForCausalLM(Qwen2Config(**QWEN_7B, dtype="bfloat16")).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config = GenerationConfig()
    return model


def save_qwen_7b(folder: Path, tokenizer: Path) -> None:
    """Write `random_qwen_7b` as a model folder of 15 GB, with the tokenizer of another folder."""
    import torch
    from transformers import AutoTokenizer

    random_qwen_7b("cuda" if torch.cuda.is_available() else "cpu").save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
