"""What the documentation names exists: files, flags, links, images, configuration keys; and defaults are true."""

import argparse
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from prmkit import cli
from prmkit.collection.command import _MOST_MISSING
from prmkit.dataset.conversion import _MOST_REJECTED
from prmkit.dataset.settings import Split
from prmkit.evaluation.export_check import DEFAULT_TOLERANCE
from prmkit.http_client import KEY_VARIABLE, Endpoint
from prmkit.registry.arguments import REPLAY
from prmkit.serving.app import Limits
from prmkit.serving.command import _CHALLENGER_SHARE, _SHADOW_SHARE
from prmkit.serving.request_log import RequestLog
from prmkit.serving.service import Service

ROOT = Path(__file__).resolve().parent.parent
LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")]
PAGES += sorted(ROOT.glob("docs/*.md"))
PROGRAMS = [
    *(name for name in LISTED if re.fullmatch(r"benchmarks/\w+\.py", name)
      and '__name__ == "__main__"' in (ROOT / name).read_text(encoding="utf-8")),
    *(name for name in LISTED if re.fullmatch(r"\w+\.(py|sh)", name)),
]  # fmt: skip
"""Longer paths before the names that they end in."""
# Runs make these; everything else that is named must be in the repository.
MADE = ("data/", "saves/", "logs/", "exported_model", "demo/", "model/", ".venv", "checkpoint-")


@cache
def _help(name: str) -> str:
    program = [sys.executable, ROOT / name] if name.endswith(".py") else [ROOT / name]
    shown = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True).stdout
    commands = re.findall(r"^    (\w+) {2,}\w", shown.partition("COMMAND\n")[2], re.MULTILINE)
    return shown + "".join(
        subprocess.run([*program, command, "--help"], capture_output=True, text=True, check=True).stdout
        for command in commands
    )


def _commands(page: Path) -> list[str]:
    """Every line of a shell block or an indented one, continued lines joined, comments off."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_lead_somewhere(page: Path) -> None:
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


def test_names_in_files_exist() -> None:
    """`prmkit/rows.py` (`read_row`): the file has that name in it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)`\s\(`(\w+)`", text)
    assert len(named) > 5
    for file, name in named:
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8")), f"{file}: {name}"


def _is_made_by_a_run(name: str) -> bool:
    """Whether the code itself writes a file of this name."""
    stem = name.rsplit("/", 1)[-1]
    return any(f'"{stem}"' in path.read_text(encoding="utf-8") for path in (ROOT / "prmkit").rglob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_are_typed_exist(page: Path) -> None:
    for command in _commands(page):
        script = next((name for name in PROGRAMS if name in command), None)
        if script:
            for flag in re.findall(r"(?<=\s)--?[a-z][\w-]*", command.partition(script)[2]):
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", _help(script)), f"{command}: {flag}"


@pytest.mark.parametrize("name", PROGRAMS)
def test_flags_in_messages_exist(name: str) -> None:
    """A command that a message, a report or a model card suggests can be typed."""
    for path in [*(ROOT / "prmkit").rglob("*.py"), *(ROOT / "prmkit").rglob("*.j2")]:
        for command in re.findall(rf"{re.escape(name)} ([^\n\"`)]*)", path.read_text(encoding="utf-8")):
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", command):
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", _help(name)), f"{path}: {name} {command}: {flag}"


def test_commands_are_found_where_they_are_shown() -> None:
    """Otherwise the test of the flags would pass without having seen any."""
    shown = [command for page in PAGES for command in _commands(page)]
    assert not [name for name in PROGRAMS if not any(name in command for command in shown)]


def test_configuration_keys_that_are_shown_are_keys_of_llama_factory() -> None:
    from prmkit.llamafactory_schema import training_keys

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        assert set(yaml.safe_load(block)) <= set(training_keys())


def test_every_file_of_the_tree_is_in_the_readme() -> None:
    (tree,) = [block for block in _blocks(ROOT / "README.md") if "├── prmkit/" in block]
    for name in {path.split("/")[0] for path in LISTED}:
        if not name.startswith("."):
            assert re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", tree), f"{name} is not in the README's tree"
    for module in {path.split("/")[1] for path in LISTED if path.startswith("prmkit/")}:
        if module != "__init__.py":
            assert module.removesuffix(".py") in tree, f"prmkit/{module} is not in the README's tree"


def _blocks(page: Path) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_no_path_of_the_machine_on_which_it_was_written() -> None:
    private = "|".join(re.escape(f"{folder}/") for folder in {ROOT.parent, Path.home()} if len(folder.parts) > 1)
    found = subprocess.run(["git", "grep", "-nIE", private], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, ""), found.stdout + found.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_keeps_to_120_characters(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "    "))]
    assert not long


# --- defaults ---------------------------------------------------------------------------------------------------------

IN_THE_CODE = {
    "convert_dataset.py --max-rejected": (_MOST_REJECTED,),
    "convert_dataset.py --eval-ratio": (Split.ratio,),
    "convert_dataset.py --split-seed": (Split.seed,),
    "evaluate_judge.py --tolerance": (DEFAULT_TOLERANCE,),
    "manage_judges.py retrain --replay": (REPLAY["base"],),
    "serve_judge.py --max-body": (Limits.body >> 20,),
    "serve_judge.py --drain": (Limits.drain,),
    "serve_judge.py --aggregate": (Service.aggregate,),
    "serve_judge.py --unscored": (Service.unscored,),
    "serve_judge.py --bad-below": (Service.bad_below,),
    "serve_judge.py --share": (_CHALLENGER_SHARE, _SHADOW_SHARE),
    "serve_judge.py --log-size": (RequestLog.largest >> 20,),
    "serve_judge.py --log-files": (RequestLog.kept,),
    "evaluate_judge.py --api-key-env": (KEY_VARIABLE,),
} | {
    f"{script} {option}": (value,)
    for script in ("score_trajectories.py", "serve_judge.py")
    for option, value in {
        "--api-key-env": KEY_VARIABLE,
        "--concurrency": Endpoint.concurrency,
        "--top-logprobs": Endpoint.top_logprobs,
        "--timeout": Endpoint.timeout,
    }.items()
}
"""Option -> the values that the code uses, where the parser cannot have them: it works without packages, or must know
whether the option was given."""


def _parser_of(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    parsers: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(cli, "run", lambda _command, parser: parsers.append(parser))
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    return parsers[0]


def _defaults(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, object, list[str]]]:
    """Yield each option of a script and its commands, its default in the parser, and the defaults that help shows."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield from _defaults(below, f"{name} {command}")
        elif action.help and action.help != argparse.SUPPRESS:
            shown = _named_defaults(action.help % vars(action))
            yield f"{name} {(action.option_strings or [action.dest])[-1]}", action.default, shown


def _named_defaults(text: str) -> list[str]:
    """The first word of every `(default X)`; often a number or a choice, sometimes the beginning of a sentence."""
    return re.findall(r"\(default:? `?([^\s:;,`)]+)", text)


def _as_shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else " ".join(value) if isinstance(value, list) else str(value)


def test_a_default_that_help_or_a_page_names_is_the_one_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    named: dict[str, list[str]] = {}
    for name in (name for name in PROGRAMS if re.fullmatch(r"\w+\.py", name)):
        for option, default, shown in _defaults(_parser_of(name, monkeypatch), name):
            named[option] = shown
            for text, value in zip(shown, IN_THE_CODE.get(option, (default,)), strict=False):
                if text[0].isdigit() or isinstance(value, str | Path | list):
                    assert text == _as_shown(value), option
    assert {option: len(named[option]) for option in IN_THE_CODE} == {key: len(of) for key, of in IN_THE_CODE.items()}
    assert sum(map(len, named.values())) > 40
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    repeated = re.findall(r"`(--[a-z-]+)`[^.;|`]*?(\(default[^)]*\))", pages)
    assert len(repeated) > 3
    for flag, text in repeated:
        assert _named_defaults(text) in [named[option][:1] for option in named if option.endswith(f" {flag}")], flag


def test_the_share_of_verdicts_that_may_be_missing() -> None:
    page = (ROOT / "docs" / "asking_judges.md").read_text(encoding="utf-8")
    for text in (_help("ask_judges.py"), page):
        assert re.findall(r"more than ([\d.]+) %", " ".join(text.split())) == [f"{100 * _MOST_MISSING:g}"]
