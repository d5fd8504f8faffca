"""Build the demo's base model: a Qwen2 of about a million random weights, with a tokenizer trained on the sample.

    python -m tools.demo.tiny_model --sample finetune.jsonl --output demo/model

It is saved like any transformers model, so everything downstream treats it as a real one. It is untrained: even its
embeddings are random, so LoRA must train them, too (`additional_target: embed_tokens,lm_head`).
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prmkit import cli
from prmkit.errors import DataError, ExitCode
from prmkit.files import read_json, read_jsonl, sha256_of, write_json

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

VOCABULARY_SIZE = 1280
"""Number of merged tokens and bytes. Small, because the embeddings take a large part of a tiny model's compute."""

ARCHITECTURE = {
    "initializer_range": 0.1,
    "hidden_size": 128,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"

DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

# What Qwen2.5's template renders, without tools: the system prompt (by default the template's own), then the turns.
CHAT_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nDEFAULT_SYSTEM<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""".replace("DEFAULT_SYSTEM", DEFAULT_SYSTEM)


RECIPE_FILE = "recipe.json"


def build_tiny_model(sample: Path, output: Path, seed: int = 0) -> bool:
    """Build the tiny base model; do nothing if the same one is already there.

    Args:
        sample: JSONL in the format of `finetune.jsonl`; the tokenizer is trained on its turns.
        output: the model folder.
        seed: the seed of the random weights.

    Returns:
        Whether the model was built by this call.

    Raises:
        DataError: the sample cannot be read, or `output` contains something that is not a model of the demo.
    """

    def build(folder: Path) -> None:
        tokenizer = _train_tokenizer(sample)
        _save_model(tokenizer, folder, seed)
        tokenizer.save_pretrained(folder)

    return build_once(output, _recipe(sample, seed), build)


def build_once(folder: Path, recipe: Mapping[str, Any], build: Callable[[Path], None]) -> bool:
    """Build a model folder, unless it already has the model of this recipe.

    Args:
        folder: the model folder.
        recipe: everything that the model depends on.
        build: writes the model into the folder that it gets.

    Returns:
        Whether the model was built by this call.

    Raises:
        DataError: `folder` contains something that is not a model of the demo.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / RECIPE_FILE).exists():
            raise DataError(f"{folder} contains something that is not the demo's model. Choose another folder.")
        if read_json(folder / RECIPE_FILE) == recipe:
            return False
    # Built next to its final place and moved there at the end, so a folder of this name is always complete.
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    build(unfinished)
    write_json(unfinished / RECIPE_FILE, recipe)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return True


def _recipe(sample: Path, seed: int) -> dict[str, Any]:
    """Return everything that the model depends on."""
    if not sample.is_file():
        raise DataError(f"{sample}: no such file. Make it with: python -m tools.make_sample --output {sample}")
    return {
        "sample_sha256": sha256_of(sample),
        "source_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "transformers": version("transformers"),
        "seed": seed,
    }


def _train_tokenizer(sample: Path) -> "Qwen2Tokenizer":
    """Train a byte-level BPE on the sample; Qwen's pre-tokenizer makes every digit a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    untrained = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = untrained.normalizer, untrained.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(_texts(sample), trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        extra_special_tokens=[START_OF_TURN, END_OF_TURN],
        model_max_length=ARCHITECTURE["max_position_embeddings"],
    )
    tokenizer.eos_token = END_OF_TURN
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(sample: Path) -> Iterator[str]:
    """Yield every turn as the chat template renders it, so that the template's words also get tokens."""
    for row in read_jsonl(sample):
        yield f"system\n{DEFAULT_SYSTEM}"
        for role, turn in zip(("user", "assistant"), row["conversations"], strict=True):
            yield f"{role}\n{turn['value']}"


def _save_model(tokenizer: "Qwen2Tokenizer", output: Path, seed: int) -> None:
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    end_of_turn, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(
        **ARCHITECTURE, vocab_size=len(tokenizer), eos_token_id=end_of_turn, pad_token_id=padding, dtype="float32"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[end_of_turn, padding], pad_token_id=padding
    )
    model.save_pretrained(output)


def _command(arguments: argparse.Namespace) -> ExitCode:
    built = build_tiny_model(arguments.sample, arguments.output, arguments.seed)
    cli.emit(f"{arguments.output}: {'built' if built else 'already there'}")
    return ExitCode.DONE


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo.tiny_model", description="Build the tiny, random base model that the demo trains."
    )
    parser.add_argument("--sample", type=Path, required=True, help="the JSONL that the tokenizer is trained on")
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default 0)")
    return cli.run(_command, parser)


if __name__ == "__main__":
    sys.exit(main())
