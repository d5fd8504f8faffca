"""The rules of the house, checked in the code itself."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "dataset", "training", "judge", "scoring", "evaluation", "trajectories", "collection", "serving",
    "registry", "rewards",
}  # fmt: skip
MAY_IMPORT = {
    "scoring": {"judge", "trajectories"},
    "evaluation": {"judge", "scoring", "trajectories"},
    "dataset": {"trajectories"},
    "collection": {"trajectories"},
    "serving": {"judge", "scoring", "trajectories"},
    "registry": {"dataset", "evaluation", "judge", "training"},
}
"""Which other packages a package may import; otherwise packages exchange only files."""
HEAVY = {
    "torch", "transformers", "llamafactory", "peft", "datasets", "matplotlib", "fastapi", "scipy", "sklearn",
    "tokenizers", "pandas", "swanlab", "omegaconf", "httpx",
}  # fmt: skip
MODULES = sorted((ROOT / "prmkit").rglob("*.py"))
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


@cache
def _nodes(path: Path) -> list[ast.AST]:
    """All nodes of a module."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    names: set[str] = set()
    for node in _top_level(path) if top_level_only else _nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _top_level(path: Path) -> Iterator[ast.AST]:
    """What is executed when a module is imported."""
    waiting = [_nodes(path)[0]]
    while waiting:
        node = waiting.pop()
        only_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not only_for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            waiting += ast.iter_child_nodes(node)


def _package(path: Path) -> str | None:
    part = path.relative_to(ROOT / "prmkit").parts[0]
    return part if part in PACKAGES else None


def _where(what: Callable[[Path], Any], paths: Sequence[Path] = MODULES) -> dict[str, Any]:
    """The files that break a rule, and what breaks it there; one test of all files, as a test of each takes longer."""
    return {str(path.relative_to(ROOT)): found for path in paths if (found := what(path))}


def test_imports_point_down() -> None:
    """Packages import shared modules and themselves; shared modules import no package, except `prmkit` itself."""

    def up(path: Path) -> set[str]:
        own = _package(path)
        ours = {name.split(".")[1] for name in _imports(path) if name.startswith("prmkit.")}
        allowed = PACKAGES if path in (ROOT / "prmkit" / "__init__.py",) else {own} | MAY_IMPORT.get(own or "", set())
        return (ours & PACKAGES) - allowed

    assert _where(up) == {}


def test_heavy_imports_wait_until_they_are_needed() -> None:
    assert _where(lambda path: {name.split(".")[0] for name in _imports(path, top_level_only=True)} & HEAVY) == {}


STREAMS = {"sys.stdout", "sys.stderr"}
WRITING = {f"{stream}.{how}" for stream in STREAMS for how in ("write", "writelines", "buffer")}


def test_only_one_module_writes_to_the_standard_streams() -> None:
    """ruff forbids print(); nothing else writes to the standard streams either."""

    def writing(path: Path) -> list[str]:
        return [
            ast.unparse(node)
            for node in _nodes(path)
            if (isinstance(node, ast.Attribute) and _dotted(node) in WRITING)
            or (isinstance(node, ast.keyword) and _dotted(node.value) in STREAMS)
        ]

    assert _where(writing).keys() == {"prmkit/cli.py"}


def _dotted(node: ast.expr) -> str | None:
    """`a.b.c` of a name and its attributes; `ast.unparse` of every node would take two seconds."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (r"llamafactory-cli|torch\.distributed\.run\b|llamafactory\.train\.", "training/"),
        (r"\bAutoModel\w*\.from_pretrained|\bPeftModel\b", "judge/transformers_judge.py"),
        (r"\(['\"]ok['\"], ['\"]unsure['\"]\)", "judge/types.py"),
    ],
)
def test_one_place_for_each_door(words: str, where: str) -> None:
    """Only training runs LLaMA Factory, one module loads a model, and one says which statuses come with scores."""
    texts = {path: path.read_text(encoding="utf-8") for path in MODULES}
    users = [str(path.relative_to(ROOT / "prmkit")) for path, text in texts.items()
             if re.search(words, text) and re.search(words, _without_comments(text))]  # fmt: skip
    assert users and all(user.startswith(where) for user in users), users


def _without_comments(text: str) -> str:
    """A module without its comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                part for part in body
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]  # fmt: skip
    return ast.unparse(tree)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_thin_and_answer_at_once(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 80
    command = [sys.executable, "-X", "importtime", ROOT / name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage:")
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "prmkit" in loaded and not loaded & (HEAVY | {"numpy", "yaml", "rich"})


WITHOUT_PACKAGES = [sys.executable, "-S", "-E"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_the_packages_a_script_helps_and_names_the_command(name: str, tmp_path: Path) -> None:
    """`-S` leaves out site-packages: what somebody has who did not install or activate anything."""
    shown = subprocess.run([*WITHOUT_PACKAGES, ROOT / name, "--help"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("usage:")
    done = subprocess.run([*WITHOUT_PACKAGES, ROOT / name, *ARGUMENTS.get(name, [])], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the Python package ") and "./run_training.sh --install-deps" in done.stderr


ARGUMENTS = {
    "manage_judges.py": ["list"],
    "label_steps.py": ["finetune.jsonl"],
    "score_trajectories.py": ["finetune.jsonl"],
    "ask_judges.py": ["finetune.jsonl", "--judges", "examples/judges.yaml", "--output", "/dev/null"],
    "import_trajectories.py": ["finetune.jsonl", "--output", "/dev/null"],
}
OLD = """
import collections, runpy, sys
Version = collections.namedtuple("Version", "major minor micro")
sys.version_info = Version(3, 10, 1)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_older_python_is_refused_in_one_sentence(name: str) -> None:
    for path in (ROOT / name, ROOT / "prmkit" / "__init__.py"):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 7))
    done = subprocess.run([sys.executable, "-c", OLD, ROOT / name, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: prmkit needs Python 3.11 or newer;") and done.stderr.count("\n") == 1


def test_every_module_is_used() -> None:
    """Every module is imported by a script, another module or a test, or started as a program of its own."""
    files = [*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / name for name in SCRIPTS)]
    imported = {part for path in files for name in _imports(path) for part in (name, name.rpartition(".")[0])}
    # Programs that a test starts in another environment.
    imported |= {name for path in files for name in re.findall(r"from (prmkit[\w.]+) import", path.read_text("utf-8"))}
    programs = {path for path in MODULES if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES}
    left_over = [name for path, name in names.items() if name not in imported and path not in programs]
    assert not [name for name in left_over if not any(other.startswith(name + ".") for other in names.values())]


# --- one name, one thing ----------------------------------------------------------------------------------------------

IN_SEVERAL_MODULES = {
    # What every module of a kind has: a reader of runs, a trainer's adapter, a script's work and parser, a table.
    "READER", "read", "recognises", "make_reward_func", "execute", "main", "make_parser", "log",
    "COLUMNS", "NUMERIC", "OPTIONAL", "TEMPLATE", "JSON_FILE", "PAGE",
    # The front door and what it opens.
    "convert",
}  # fmt: skip


def test_a_public_name_means_one_thing() -> None:
    """A reader who searches for a name finds one definition. Prefix a second one with its package's noun."""
    modules: dict[str, list[str]] = {}
    for path in MODULES:
        for name in _public_names(path):
            modules.setdefault(name, []).append(str(path.relative_to(ROOT / "prmkit")))
    twice = {name: places for name, places in modules.items() if len(places) > 1}
    assert not {name: places for name, places in twice.items() if name not in IN_SEVERAL_MODULES}
    assert twice.keys() >= IN_SEVERAL_MODULES


def _public_names(path: Path) -> set[str]:
    """The names that a module defines at top level."""
    names: set[str] = set()
    for node in _nodes(path)[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return {name for name in names if not name.startswith("_")}


# --- plain English and size -------------------------------------------------------------------------------------------

PRIVATE_WORDS = re.compile(
    r"(?i:\b(mend(s|ed|ing)?|anew|beside|in silence|for ever|set aside|stands|told|tells|all the same|kin|goes on)\b)"
    r"|\bis none\b(?! (else|%))"  # `is None` is code, and so is `is none` in a template
    r"|\bsystem text|(?i:\blearnt\b|\bthe guide\b|\blower ends?\b|\b(tokens|rows|GB) a (second|step|file)\b)"
    r"|\bName (it|another|its|the folder)\b"  # pass, choose, set
    r"|(?i:\brightly\b|\b(a|the|no) kill\b|: likewise\b|\bleave (it|one|the key) out\b)"  # remove
    r"|\b(None|empty|zero) without (it|one|any|them|either)\b|\busual forms?\b|\btries a second\b"
)
WRITTEN = [
    *MODULES, *(ROOT / name for name in SCRIPTS),
    *(path for pattern in ("*.sh", "*.md", "*.yaml", "docs/*.md", "configs/*.yaml", "examples/*.yaml", "prmkit/**/*.j2",
                           "prmkit/**/*.html", "prmkit/**/*.yaml") for path in ROOT.glob(pattern)),
]  # fmt: skip


def test_plain_english() -> None:
    """Words over which a native reader stumbles. Write repair, again, silently, reject, report, is, continue."""

    def stumbling(path: Path) -> list[str]:
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        return [f"{number}: {line}" for number, line in lines if PRIVATE_WORDS.search(line)]

    assert _where(stumbling, WRITTEN) == {}


def test_the_package_stays_small() -> None:
    """A reader holds the rooms of the house in the head; forms and trainers are one file each, and do not count."""
    modules = [path for path in MODULES if path.name != "__init__.py"]
    one_each = [path for path in modules if path.parent.name in ("readers", "labels", "rewards")]
    assert len(modules) - len(one_each) <= 119


def test_functions_stay_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in [*MODULES, *(ROOT / name for name in SCRIPTS)]
        for node in _nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 50  # type: ignore[operator]
    ]
    assert not long


def test_no_group_is_possessive() -> None:
    """Python 3.11.0 to 3.11.4, as in Debian 12, lose matches of `(a)?+` (gh-106052), and not of `(?>(a)?)`."""
    possessive = re.compile(r"[^\\]\)(?:[?*+]|\{{1,2}[\d,]+\}{1,2})\+")
    assert _where(lambda path: possessive.findall(path.read_text(encoding="utf-8").replace("(…)?+", ""))) == {}
