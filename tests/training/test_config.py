"""Reading a config and its overrides: everything that is wrong is reported, at once, with what to write instead."""

import subprocess
import sys
from pathlib import Path

import pytest
from complaints import NO_GPU, complaint, resolved
from layout import CONFIG, write_config

from prmkit.errors import UsageError
from prmkit.llamafactory_schema import default_of, read_yaml, setting
from prmkit.training.config import Override, parse_assignment, render_yaml, resolve_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml")


# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("learning_rate=1e-4", 1e-4),
        ("max_grad_norm=2", 2),
        ("lora_rank=0x10", 16),
        ("bf16_full_eval=false", False),
        ("do_eval=true", True),
        ("eval_strategy=no", "no"),
        ("save_strategy=no", "no"),
        ("save_strategy='no'", "no"),
        ("run_name=123", "123"),
        ("run_name=1e-4", "1e-4"),
        ("run_name=yes", "yes"),
        ("resume_from_checkpoint=false", False),
        ("run_name=a=b", "a=b"),
        ("default_system=Judge: be strict", "Judge: be strict"),
        ("default_system={unclosed", "{unclosed"),
        ("report_to=[tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("lora_target=q_proj,v_proj", "q_proj,v_proj"),
        ("lora_target=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("include_num_input_tokens_seen=no", False),
        ("--lora_rank=4", 4),
    ],
)
def test_override_is_typed_as_llama_factory_types_it(config: Path, assignment: str, value: object) -> None:
    key = assignment.removeprefix("--").partition("=")[0]
    found = resolved(config, assignment)
    assert found.values[key] == value
    assert type(found.values[key]) is type(value)
    assert found.sources[key] == "key=value"


def test_override_by_presence_not_by_truth(config: Path) -> None:
    found = resolve_config(config, [Override("weight_decay", "0", "--flag"), Override("seed", "0", "--flag")])
    assert (found.values["weight_decay"], found.values["seed"]) == (0, 0)


def test_empty_override_takes_a_key_out_of_the_file(config: Path) -> None:
    assert "lora_rank" not in resolved(config, "lora_rank=").values


def test_a_mistyped_key_cannot_be_taken_out(config: Path) -> None:
    assert "Did you mean lora_rank?" in complaint(config, "lora_rnak=")


def test_code_of_a_model_runs_only_if_that_is_typed(config: Path) -> None:
    """A config may come from somebody else, with the model."""
    config.write_text(config.read_text() + "trust_remote_code: true\n")
    assert "trust_remote_code=true" in complaint(config)
    assert resolved(config, "trust_remote_code=true").values["trust_remote_code"] is True
    assert "trust_remote_code" not in resolved(config, "trust_remote_code=").values


def test_a_wrong_key_of_the_file_can_be_taken_out(config: Path) -> None:
    config.write_text(config.read_text() + "evaluation_strategy: steps\n")
    resolved(config, "evaluation_strategy=")


def test_same_key_twice_with_two_values_is_refused(config: Path) -> None:
    overrides = [Override("num_train_epochs", "3", "--epochs"), parse_assignment("num_train_epochs=5")]
    with pytest.raises(UsageError, match=r"given twice: 3 \(--epochs\) and 5 \(key=value\)"):
        resolve_config(config, overrides, machine=NO_GPU)


def test_every_value_has_a_source(config: Path) -> None:
    found = resolved(config, "lora_rank=4")
    assert found.values.keys() == found.sources.keys()
    assert found.sources["learning_rate"] == str(config)


# --- the file -----------------------------------------------------------------------------------------------------


def test_a_rendered_yaml_reads_back_the_same(tmp_path: Path) -> None:
    values = {"a": "1e-4", "b": "no", "c": 1e-05, "d": "8", "e": "", "f": "x: y", "g": [1, "true"], "h": "Größe\n2",
              "i": True, "j": "null", "k": {"version": 2}, "l": "0x1F", "m": "2026-01-01"}  # fmt: skip
    path = tmp_path / "rendered.yaml"
    path.write_text(render_yaml(values))
    assert read_yaml(path) == values


# --- traps --------------------------------------------------------------------------------------------------------

TRAPS = {
    # names that went away
    "evaluation_strategy=steps": "Write eval_strategy",
    "group_by_length=true": "train_sampling_strategy: group_by_length",
    "tokenizer_name_or_path=./model": "always comes from model_name_or_path",
    "modules_to_save=lm_head": "additional_target",
    "torch_dtype=bfloat16": "bf16: true",
    "save_safetensors=true": "Remove it",
    "experiment_name=x": "run_name",
    "lora_plus_scale=16": "loraplus_lr_ratio",
    "additional_special_tokens=<a>": "add_special_tokens",
    "no_cuda=true": "use_cpu",
    "per_gpu_train_batch_size=2": "per_device_train_batch_size",
    "push_to_hub_token=x": "hf auth login",
    "include_inputs_for_metrics=true": "include_for_metrics",
    "jit_mode_eval=true": "Remove it",
    "half_precision_backend=amp": "Remove it",
    "model_max_length=100": "cutoff_len",
    # names that were mistyped
    "learnig_rate=1e-4": "Did you mean learning_rate?",
    "lora-rank=8": "Did you mean lora_rank?",
    "zzz=1": "has no such key",
    # wrong types
    "learning_rate='1e-4'": "Write learning_rate: 1e-4 without quotes",
    "lora_rank='8'": "Write lora_rank: 8 without quotes",
    "plot_loss='false'": "Write plot_loss: false without quotes",
    "lora_rank=8.0": "Write 8.",
    "lora_rank=many": "needs a whole number",
    "max_steps=1e3": "Write 1000.",
    "plot_loss=1": "Write true.",
    "lora_rank=[8]": "needs a whole number",
    "output_dir=[a]": "needs a string",
    "lora_rank=true": "needs a whole number",
    # values outside the choices
    "stage=sfft": "Did you mean sft?",
    "finetuning_type=lore": "Did you mean lora?",
    "save_strategy=step": "Did you mean steps?",
    "flash_attn=flash": "Use one of: auto",
    "optim=adamw_hf": "not a valid value",
    "lr_scheduler_type=cosin": "Did you mean cosine?",
    "template=qwenn": "Did you mean qwen",
    "train_sampling_strategy=length": "group_by_length",
    "swanlab_mode=clout": "Did you mean cloud?",
    # values that LLaMA Factory takes and then dies of
    "max_samples=-1": "Remove the key to use every row",
    "max_samples=0": "at least 1",
    "resume_from_checkpoint=''": "is an empty string",
    "adapter_name_or_path=''": "is an empty string",
    "eval_dataset='' eval_strategy=no": "is an empty string",
    "swanlab_workspace=''": "is an empty string",
    "swanlab_api_key=s3cr3t": "SWANLAB_API_KEY",
    "hf_hub_token=s3cr3t": "secrets are not allowed",
    "ms_hub_token=s3cr3t": "hf auth login",
    "swanlab_lark_secret=s3cr3t": "secrets are not allowed",
    "export_hub_model_id=https://me:s3cr3t@host/x": "secrets are not allowed",
    "adapter_name_or_path=[a,b]": "Write one string: a,b",
    "flash_attn=fa3": "NotImplementedError",
    "tokenized_path=rows": "trains on the rows in this folder",
    "quantization_bit=0": "does not support 0-bit quantization",
    "quantization_bit=5": "Write 4 or 8",
    "report_to=none,wandb": "report_to: [none, wandb]",
    "report_to=wandbb": "no logger 'wandbb'",
    "report_to=swanlab": "use_swanlab: true",
    "do_train=false": "nothing would be trained",
    # numbers that make no sense
    "learning_rate=0": "more than 0",
    "learning_rate=3": "less than 1",
    "learning_rate=.nan": "is nan",
    "num_train_epochs=-1": "more than 0",
    "per_device_train_batch_size=0": "at least 1",
    "gradient_accumulation_steps=0": "at least 1",
    "lora_rank=-8": "at least 1",
    "lora_dropout=1.0": "less than 1",
    # what must be there
    "dataset=": "dataset: is not set",
    "model_name_or_path=": "model_name_or_path: is not set",
    "output_dir=": "output_dir: is not set",
    "dataset=[]": "dataset (key=value): is an empty list",
    "eval_dataset=[] eval_strategy=no": "eval_dataset (key=value): is an empty list",
    "lora_target=[]": "lora_target (key=value): is an empty list",
}


@pytest.mark.parametrize("assignments", TRAPS)
def test_trap(config: Path, assignments: str) -> None:
    reported = complaint(config, *assignments.split(" "))
    assert TRAPS[assignments] in reported and "s3cr3t" not in reported.partition("\n")[2]
    assert reported.startswith(f"{config}: 1 error (LLaMA Factory")


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        ("report_to: null", "Write report_to: none"),
        ("flash_attn: null", "Remove the key for LLaMA Factory's default, auto"),
        ("cutoff_len: null", "default, 2048"),
        ("run_name: 123", "Put it in quotes: '123'"),
        ("do_eval: 'no'", "Write do_eval: no without quotes"),
    ],
)
def test_trap_in_a_file(tmp_path: Path, changes: str, reported: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model_name_or_path: model\ndataset: steps\noutput_dir: saves/run\n{changes}\n")
    assert reported in complaint(path)


@pytest.mark.parametrize(
    "line",
    ["adapter_name_or_path: null", "resume_from_checkpoint: null", "deepspeed: null", "template: null",
     "enable_thinking: null", "default_system: ''", "swanlab_mode: offline", "swanlab_mode: disabled",
     "resume_from_checkpoint: false", "report_to: []", "dataset: [steps]", "warmup_steps: 0.1", "save_steps: 0.05"],
)  # fmt: skip
def test_what_only_looks_like_a_trap(tmp_path: Path, line: str) -> None:
    path = tmp_path / "c.yaml"
    base = "".join(f"{key}: {value}\n" for key, value in CONFIG.items() if not line.startswith(key))
    path.write_text(base + line + "\n")
    resolved(path)


def test_seven_mistakes_in_one_report(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", learning_rate=None, save_strategy=None)
    mistakes = {
        "evaluation_strategy": "steps", "learning_rate": "'1e-4'", "lora_rnak": "8", "max_samples": "-1",
        "flash_attn": "fa3", "packing": "true", "save_strategy": "sometimes",
    }  # fmt: skip
    path.write_text(path.read_text() + "".join(f"{key}: {value}\n" for key, value in mistakes.items()))
    reported = complaint(path)
    assert "7 errors" in reported
    assert all(f"\n  {key}: " in reported for key in mistakes)


def test_a_problem_says_where_it_was_typed(config: Path) -> None:
    with pytest.raises(UsageError, match=r"num_train_epochs \(--epochs\): is 'five'"):
        resolve_config(config, [Override("num_train_epochs", "five", "--epochs")], machine=NO_GPU)


def test_a_typo_is_reported_in_under_two_seconds_by_a_fresh_process(config: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from prmkit.training.config import *\n"
        "from prmkit.errors import UsageError\n"
        "try: resolve_config(Path(sys.argv[1]), [parse_assignment('learnin_rate=1')])\n"
        "except UsageError as error: print(error)\n"
        "print([name for name in ('torch', 'transformers', 'llamafactory') if name in sys.modules])"
    )
    before = sum(_children())
    done = subprocess.run([sys.executable, "-c", program, str(config)], capture_output=True, text=True, check=True)
    spent = sum(_children()) - before
    assert "Did you mean learning_rate?" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert spent < 2.0  # of processor time: the wall clock of a busy machine says nothing


def _children() -> tuple[float, float]:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime, usage.ru_stime


# --- defaults -----------------------------------------------------------------------------------------------------


def test_defaults_come_from_the_installed_llama_factory() -> None:
    assert (default_of("cutoff_len"), default_of("lora_rank"), default_of("num_train_epochs")) == (2048, 8, 3.0)
    assert setting({"cutoff_len": 64}, "cutoff_len") == 64 and setting({}, "cutoff_len") == 2048
    assert setting({"lora_alpha": None}, "lora_alpha") is None, "null is a value"
    with pytest.raises(KeyError):
        default_of("cutof_len")
