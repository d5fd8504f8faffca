"""What the documentation names exists: files, flags, links, pictures, configuration keys."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "RESULTS.md"]
SCRIPTS = ["convert_dataset.py", "train.py", "evaluate_judge.py", "score_trajectories.py"]
# What runs make; everything else that is named must be in the repository.
MADE = ("data/", "saves/", "logs/", "exported_model", "demo/", "model/", ".venv", "checkpoint-")


@cache
def _help(name: str) -> str:
    program = [sys.executable, ROOT / name] if name.endswith(".py") else [ROOT / name]
    return subprocess.run([*program, "--help"], capture_output=True, text=True, check=True).stdout


def _commands(page: Path) -> list[str]:
    """Every line of a shell block, continued lines joined, comments off."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`(?:\./)?([\w.-]+(?:/[\w.{},-]+)*\.(?:py|sh|yaml|toml|txt|md|jsonl|json))`", page.read_text())
    for name in named:
        if name.startswith(MADE) or "{" in name:
            continue
        found = (ROOT / name).exists() or list(ROOT.glob(f"prmkit/**/{name}")) or list(ROOT.glob(f"*/{name}"))
        assert found or _is_made_by_a_run(name), name


def _is_made_by_a_run(name: str) -> bool:
    """Whether the code itself writes a file of this name."""
    stem = name.rsplit("/", 1)[-1]
    return any(f'"{stem}"' in path.read_text(encoding="utf-8") for path in (ROOT / "prmkit").rglob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_are_typed_exist(page: Path) -> None:
    for command in _commands(page):
        script = next((name for name in [*SCRIPTS, "run_training.sh"] if name in command), None)
        if script:
            for flag in re.findall(r"(?<=\s)--?[a-z][\w-]*", command):
                assert re.search(rf"{flag}\b", _help(script)), f"{command}: {flag}"


def test_configuration_keys_that_are_shown_are_keys_of_llama_factory() -> None:
    from prmkit.training.schema import training_keys

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        assert set(yaml.safe_load(block)) <= set(training_keys())


def test_every_file_of_the_tree_is_in_the_readme() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in {path.split("/")[0] for path in listed}:
        if not name.startswith("."):
            assert name in readme, f"{name} is not in the README's tree"
    for module in {path.split("/")[1] for path in listed if path.startswith("prmkit/")}:
        if module != "__init__.py":
            assert module in readme, f"prmkit/{module} is not in the README's tree"


def test_the_project_speaks_of_itself_alone() -> None:
    listed = subprocess.run(["git", "grep", "-nIE", r"/(work|farm)/|/tmp/w/|/root/"], cwd=ROOT, capture_output=True)
    others = [line for line in listed.stdout.decode().splitlines() if not line.startswith("tests/test_docs.py")]
    assert not others
