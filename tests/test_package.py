"""prmkit as a package: what it needs, what it carries, and the functions that it offers."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import prmkit

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names_in(file: str) -> set[str]:
    return set(re.findall(r"^([\w-]+)(?=[=\[])", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))


def test_the_core_is_part_of_the_tested_set() -> None:
    assert set(PROJECT["project"]["dependencies"]) <= names_in("requirements.txt")
    assert not names_in("requirements.txt") & names_in("requirements-dev.txt")
    assert set(PROJECT["tool"]["setuptools"]["dynamic"]["optional-dependencies"]) == {"train", "serve", "dev"}


def test_every_file_of_the_package_is_packed() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    listed = subprocess.run(["git", "ls-files", "prmkit"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split()]
    assert not [path for path in files if path.suffix != ".py" and not any(map(path.match, patterns))]
    assert not [path for path in files if not (path.parent / "__init__.py").exists()]


# A Python that has the core's dependencies and nothing of the extras.
CORE_ALONE = """
import importlib.abc, sys
class Extras(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "llamafactory", "omegaconf", "scipy", "matplotlib",
                                      "peft", "datasets", "tokenizers", "pandas", "sklearn", "fastapi", "swanlab"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Extras())
import prmkit
"""


def run_core(code: str, folder: Path) -> str:
    command = [sys.executable, "-c", CORE_ALONE + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_verdict_is_read_with_the_core_alone(tmp_path: Path) -> None:
    shown = run_core("print(prmkit.read_verdict('```json\\n{\"score\": 0.8}\\n```').scores)", tmp_path)
    assert shown == "{'score': 0.8}\n"


def test_rows_are_converted_with_the_core_alone_from_any_working_directory(tmp_path: Path) -> None:
    code = f"""
report = prmkit.convert({str(ROOT / "finetune.jsonl")!r}, "data", evaluation_types=["clip"])
print(sorted(report)[:1], __import__("pathlib").Path("data/dataset_info.json").exists())
"""
    assert run_core(code, tmp_path).splitlines()[-1].endswith("True")


def test_what_the_package_offers() -> None:
    for name in prmkit.__all__:
        assert getattr(prmkit, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        prmkit.nothing  # noqa: B018
