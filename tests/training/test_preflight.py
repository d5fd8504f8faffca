"""All checks before a run, on real projects: every error is reported at once, LLaMA Factory's own among them."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from layout import MakeProject
from processes import start_command, wait_for

import prmkit
from prmkit.training.checks import Check, Status, errors_in
from prmkit.training.config import parse_assignment, resolve_config
from prmkit.training.environment import this_machine
from prmkit.training.preflight import run_checks

pytestmark = pytest.mark.llamafactory
ROOT = Path(prmkit.__file__).parents[1]


def checked(project: Path, *assignments: str, **values: Any) -> dict[str, Check]:
    """The checks of a project, by name, from its folder."""
    config = resolve_config(project / "config.yaml", [parse_assignment(text) for text in assignments])
    request = {
        "values": {**config.values, **values}, "dropped": dict(config.dropped), "sources": dict(config.sources),
        "processes": 1, "world_size": 1, "evaluate": False,
    }  # fmt: skip
    shown: list[Check | str] = []
    checks = run_checks(request, shown.append)
    assert [check for check in shown if isinstance(check, Check)] == checks
    assert any("Loading LLaMA Factory" in note for note in shown if isinstance(note, str))
    return {check.name: check for check in checks}


@pytest.fixture
def project(make_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_project(tmp_path / "a project")
    monkeypatch.chdir(folder)
    return folder


def test_a_project_that_is_ready(project: Path) -> None:
    heavy = {"torch", "transformers", "llamafactory", "datasets"} - sys.modules.keys()
    found = checked(project)
    assert not heavy & sys.modules.keys(), "only the child imports LLaMA Factory"
    assert not errors_in(list(found.values())), found
    assert {"Python", "versions", "llamafactory-cli", "model folder", "datasets", "held-out", "template", "row lengths",
            "GPU", "precision", "memory", "disk", "packages", "SwanLab", "LLaMA Factory starts", "trainer",
            "LLaMA Factory's own parser"} <= found.keys()  # fmt: skip
    assert "accepts all" in found["LLaMA Factory's own parser"].found
    assert "truncates no row" in found["row lengths"].found


def test_a_project_with_everything_wrong_gets_one_list(project: Path) -> None:
    weights = project / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    found = checked(
        project, "template=llama3", "cutoff_len=32", "dataset=stepz", "eval_dataset=steps_eval",
        "resume_from_checkpoint=nowhere", "quantization_bit=4", 'lr_scheduler_kwargs="{broken"',
    )  # fmt: skip
    wrong = {check.name for check in errors_in(list(found.values()))}
    assert wrong == {"model folder", "datasets", "template", "row lengths", "settings", "GPU", "packages",
                     "LLaMA Factory's own parser"}  # fmt: skip
    assert found["template"].advice.startswith("template=qwen")
    assert "JSONDecodeError" in found["LLaMA Factory's own parser"].found


def test_a_damaged_tokenizer_hides_nothing(project: Path) -> None:
    """What the trainer would fail of after the model has loaded is found as well."""
    (project / "model" / "tokenizer.json").write_text("{}")
    found = checked(project, "optim=lomo", "lr_scheduler_type=cosine_with_min_lr", "report_to=mlflow")
    assert found["template"].status is Status.ERROR
    assert found["LLaMA Factory's own parser"].status is Status.OK
    reported = found["trainer"].found
    assert all(word in reported for word in ("lomo_optim", "min_lr_rate should be set", "requires mlflow"))


def test_a_chat_template_without_an_end_is_stopped(project: Path) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
    (project / "model" / "chat_template.jinja").write_text(endless)
    found = checked(project)
    assert "the model's chat template: still running after 10 seconds" in found["template"].found
    trainer = found["trainer"]
    assert trainer.status is Status.OK
    assert trainer.found == "can create the optimizer, the schedule and the loggers (adamw_torch_fused, cosine)"


@pytest.mark.new_processes
def test_a_hub_name_without_a_network_does_not_take_a_minute(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    start = time.monotonic()
    hub = checked(project, model_name_or_path="some/model")
    assert time.monotonic() - start < 40  # it took 54 seconds
    assert hub["template"].status is Status.ERROR
    assert hub["template"].advice == "Download the model first: hf download some/model --local-dir model"


@pytest.mark.new_processes
def test_a_kill_during_the_checks_leaves_nothing(project: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, str(ROOT / "train.py"), "--config", "config.yaml", "--validate-only"]
    with start_command(command, project, TMPDIR=str(temporary)) as started:
        assert wait_for(lambda: started.pid_of("prmkit.training.preflight"), 30)
        started.process.kill()
        assert wait_for(lambda: not started.living(), 5), started.living()
    assert list(temporary.iterdir()) == []


def test_a_torch_that_cannot_be_imported_is_reported(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a torchvision for another torch looks like from outside: an import that fails."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    found = checked(project)["LLaMA Factory starts"]
    assert found.status is Status.ERROR
    assert "torchvision::nms" in found.found


@pytest.mark.parametrize(
    ("dies", "why"),
    [("raise RuntimeError('broken')", "RuntimeError: broken"), ("import os; os._exit(0)", "exit code 0")],
)
def test_checks_that_end_before_the_last_one_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str, why: str
) -> None:
    """No check has begun yet, so there is none to blame; and nothing that was found must not mean ready."""
    (tmp_path / "orjson.py").write_text(dies)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    (found,) = run_checks({"values": {}}, lambda shown: None)
    assert (found.name, found.status, found.found) == ("all checks", Status.ERROR, why)


def test_this_machine_has_what_the_tests_suppose() -> None:
    assert this_machine().packages.keys() >= {"swanlab", "swanboard", "matplotlib"}
