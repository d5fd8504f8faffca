"""Tiny judges, built once a session."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import families
import pytest

from prmkit.judge.sources import JudgeSource
from prmkit.judge.transformers_judge import LocalJudge, load_model


@pytest.fixture(scope="session")
def few_threads() -> Iterator[None]:
    """Tiny models are quicker on one thread than on many."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder for each family."""
    return {name: families.build(name, tmp_path_factory.mktemp(name)) for name in families.TEMPLATES}


@pytest.fixture(scope="session")
def judges(model_folders: dict[str, Path], few_threads: None) -> dict[str, LocalJudge]:
    """A loaded judge for each family."""
    return {
        name: load_model(JudgeSource(model_folders[name], template=template, cutoff_len=2048))
        for name, template in families.TEMPLATES.items()
    }


@pytest.fixture(params=list(families.TEMPLATES))
def judge(request: pytest.FixtureRequest, judges: dict[str, LocalJudge]) -> LocalJudge:
    """Each family's judge in turn."""
    return judges[request.param]


@pytest.fixture(scope="session")
def retrained(model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model like qwen's, with other weights."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("retrained")
    shutil.copytree(model_folders["qwen"], folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.mul_(0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(model_folders: dict[str, Path], retrained: Path) -> Iterator[str]:
    """The address of a real HTTP server with every family's model and another one, in a separate process."""
    script = Path(__file__).with_name("completions_server.py")
    models = [f"{name}={folder}" for name, folder in {**model_folders, "other": retrained}.items()]
    with subprocess.Popen([sys.executable, str(script), *models], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()
