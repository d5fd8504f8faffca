"""Compare two environments by the token ids and log probabilities that a model folder gives in each.

    python tools/export_numbers.py MODEL NUMBERS.json
    python tools/export_numbers.py --compare NUMBERS.json OTHER.json

Imports nothing from prmkit, so that it runs in any environment that has torch and transformers.
"""

import json
import sys
from pathlib import Path
from typing import Any

TEXTS = (
    "Was this step good? {{ braces }} 'x' \"y\"\n\n步骤  état 12,345 ½ <think>",
    "<|im_start|>user\nJudge.<|im_end|></s><eos>",
    "  leading\t\n",
)
MAX_DIFFERENCE = 1e-4
"""The largest difference allowed between two log probabilities, for weights in float32."""


def numbers_of(model: str) -> dict[str, Any]:
    """Return token ids of texts and of a rendered prompt, and the top log probabilities after each of its tokens."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": TEXTS[0]}]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template(messages, **settings) if tokenizer.chat_template else []
    ids = {"texts": [tokenizer(text)["input_ids"] for text in TEXTS], "prompt": prompt}
    network = AutoModelForCausalLM.from_pretrained(model).float().eval()
    with torch.no_grad():
        log_probabilities = network(torch.tensor([prompt or ids["texts"][0]])).logits[0].log_softmax(-1)
    top = log_probabilities.topk(5)
    return {
        "transformers": transformers.__version__,
        "ids": {**ids, "special": sorted(tokenizer.all_special_ids)},
        "sampling": {key: getattr(network.generation_config, key) for key in ("repetition_penalty", "temperature")},
        "tokens": top.indices.tolist(),
        "log_probabilities": top.values.tolist(),
    }


def compare(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, bool]:
    """Describe how two environments differ, and return whether they agree."""
    names = f"transformers {one['transformers']} and {other['transformers']}"
    if one["ids"] != other["ids"]:
        return f"{names}: different token ids.", False
    rows = zip(one["log_probabilities"], other["log_probabilities"], strict=True)
    largest = max(abs(a - b) for left, right in rows for a, b in zip(left, right, strict=True))
    positions = len(one["tokens"])
    alike = largest <= MAX_DIFFERENCE and one["tokens"] == other["tokens"] and one["sampling"] == other["sampling"]
    message = f"{names}: same token ids; {positions} positions, largest difference of a log probability {largest:.1e}."
    return message, alike


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        message, alike = compare(*(json.loads(Path(path).read_text()) for path in sys.argv[2:4]))
        sys.stdout.write(f"{message}\n")
        sys.exit(0 if alike else 1)
    Path(sys.argv[2]).write_text(json.dumps(numbers_of(sys.argv[1])))
