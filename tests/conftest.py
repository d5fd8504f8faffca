"""What all tests share: the scripts as a user runs them, the sample, and one tiny model."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from narrated import Narrated
from preloaded import ADDRESS, HEAVY, PRELOADED, forks_of

ROOT = Path(__file__).resolve().parent.parent

pytest_plugins = ["judge_fixtures"]

# Several tests at once, and models of a million weights: more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# glibc gives freed memory back at once; to get it again takes half of the time of statistics on a few hundred scores.
# With a larger pad alone, arrays are mapped one by one again as soon as something small lies at the end of the heap.
for setting, size in {"MMAP_THRESHOLD": 1 << 30, "TRIM_THRESHOLD": 1 << 30, "TOP_PAD": 16 << 20}.items():
    os.environ.setdefault(f"MALLOC_{setting}_", str(size))
# Nothing in the tests may reach for a hub or a cloud.
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_DISABLED": "true"}
# The environment of the tests is the active one: run_training.sh uses it, and commands are suggested with `python`.
os.environ["VIRTUAL_ENV"] = sys.prefix
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# A shell that starts the tests in the background makes them, and all that they start, deaf to SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
# And nohup makes them ignore SIGHUP.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
CHILDREN = Path(__file__).with_name("children")  # its sitecustomize.py: what every Python that a test starts does first
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHILDREN), str(ROOT), os.environ.get("PYTHONPATH")]))
sys.path.insert(0, str(ROOT))
if sys.modules.get("sklearn", sys) is None:  # a worker of pytest-xdist is a child as well, but tests use scikit-learn
    del sys.modules["sklearn"]


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Iterator[None]:
    """While all workers run their tests, one Python waits with LLaMA Factory imported; `--all` does without."""
    if ADDRESS in os.environ or hasattr(config, "workerinput"):
        return (yield)
    with forks_of(HEAVY) as os.environ[ADDRESS]:
        return (yield)


LOADING_MODELS = {
    f"tests/{name}.py"
    for name in (
        *("judge/test_transformers_judge", "judge/test_batching", "judge/test_score_trie", "judge/test_scorer"),
        *("judge/test_sources", "evaluation/test_evaluate", "evaluation/test_exam", "evaluation/test_export_check"),
        *("scoring/test_runs", "scoring/test_score", "serving/test_payloads", "dataset/test_lengths"),
        *("prompts/test_cleaning", "prompts/test_encoding", "training/test_input_checks", "training/test_model"),
        *("training/test_llamafactory_checks", "training/test_portable", "training/test_resume", "training/test_train"),
        *("tools/test_tiny_model", "test_dataset_info"),
    )
}
"""Files whose tests import transformers themselves, also with `--fast`."""


def _without_llamafactory(config: pytest.Config) -> bool:
    return "not llamafactory" in config.option.markexpr


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--fast`, one worker gets the files that load models: to import transformers takes six seconds in each."""
    from xdist.scheduler import LoadFileScheduling

    class ModelsTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "files that load models" if file in LOADING_MODELS else file

    together = config.option.dist == "loadfile" and _without_llamafactory(config)
    return ModelsTogether(config, log) if together else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long comes first, so that no worker has a long file left when the others are done."""
    if _without_llamafactory(config):
        items.sort(key=lambda item: item.nodeid.partition("::")[0] not in LOADING_MODELS)
        return
    first = {item.path for item in items if item.get_closest_marker("llamafactory")}
    items.sort(key=lambda item: (item.path not in first, "integration" not in item.path.parts))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Do without it if no test starts LLaMA Factory, as with `--fast`."""
    if not any(item.get_closest_marker("llamafactory") for item in session.items):
        os.environ.pop(ADDRESS, None)


@pytest.fixture(autouse=True)
def _importing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test starts imports its packages itself, unless the test is one of LLaMA Factory's or a slow one."""
    marked = request.node.get_closest_marker
    if marked("new_processes") or not (marked("llamafactory") or marked("slow")):
        monkeypatch.delenv(ADDRESS, raising=False)


@pytest.fixture
def narrated() -> Iterator[Narrated]:
    """What the package logs."""
    logger, handler = logging.getLogger("prmkit"), Narrated()
    before = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder that holds the scripts."""
    return ROOT


@pytest.fixture(scope="session")
def sample(root: Path) -> Path:
    """The sample that ships."""
    return root / "finetune.jsonl"


@pytest.fixture(scope="session")
def tiny_model(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base model: about a million random weights, with a real tokenizer and chat template."""
    from tools.demo.tiny_model import build_tiny_model

    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny_model(sample, folder)
    return folder


WITH_MODELS = ("train.py", "score_trajectories.py", "evaluate_judge.py")
Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def script(root: Path) -> Script:
    """Run one of the scripts as a user does, and fail on any other exit code than the expected one."""

    def run(
        name: str, *arguments: object, code: int = 0, cwd: Path = root, stdin: str | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        command = [str(root / name), *map(str, arguments)]
        if name.endswith(".py") and not (name in WITH_MODELS and os.environ.get(ADDRESS)):
            done = PRELOADED.run(*command, cwd=cwd, stdin=stdin, timeout=timeout)
        else:
            command = [sys.executable, *command] if name.endswith(".py") else command
            done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == code, f"{name} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run
