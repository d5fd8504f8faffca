"""The real clients of trainers, installed over the tested environment."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOOD, POOR, CLOSE = 0.9, 0.2, 0.03
pytestmark = pytest.mark.network

OPENRLHF = """
import asyncio, json, sys
from openrlhf.utils.agent import SingleTurnAgentExecutor
url, key, file = sys.argv[1:]
ask = "<|im_start|>user\\nWhat?<|im_end|>\\n<|im_start|>assistant\\n"
found = {}
for said in ("good", "bad", "mumble"):
    for name, remote in (("http", f"{url}/get_reward"), ("file", file)):
        executor = SingleTurnAgentExecutor(remote)
        fetch = executor._fetch_rewards_via_func if executor.reward_func else executor._fetch_rewards_via_http
        try:
            (answer,) = asyncio.run(fetch([ask + said + "<|im_end|>"], [ask], [""]))
            found[f"{name} {said}"] = float(answer["rewards"][0])
        except Exception as error:
            found[f"{name} {said}"] = type(error).__name__
print(json.dumps(found))
"""


def test_openrlhfs_own_client_gets_rewards_and_never_a_silent_zero(
    judge_url: str, installed: Callable[..., Path], output_of: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "reward.py"
    file.write_text(
        f"from prmkit.rewards.openrlhf import make_reward_func\nreward_func = make_reward_func({judge_url!r})\n"
    )
    overlay = installed("openrlhf==0.11.2", "pylatexenc==2.11")
    found = output_of(sys.executable, _path(overlay), OPENRLHF, judge_url, "-", file)
    assert [found["http good"], found["file good"]] == pytest.approx([GOOD, GOOD], abs=CLOSE)
    assert found["http bad"] == pytest.approx(POOR, abs=CLOSE)
    assert found["http mumble"] == "RuntimeError" and found["file mumble"] == "JudgeUnavailable"


TRL = """
import json, sys
import torch, trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from prmkit.rewards.trl import make_reward_func
url, model, output = sys.argv[1:]
seen = []
judge = make_reward_func(url)
def watched(prompts, completions, **more):
    values = judge(prompts=prompts, completions=completions, **more)
    seen.extend(values)
    return values
settings = trl.GRPOConfig(
    output_dir=output, per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=3,
    report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
)
trainer = trl.GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(model), processing_class=AutoTokenizer.from_pretrained(model),
    reward_funcs=watched, args=settings, train_dataset=Dataset.from_dict({"prompt": ["What is 2 + 2?"] * 8}),
)
trainer.train()
logged = [entry["rewards/watched/mean"] for entry in trainer.state.log_history if "rewards/watched/mean" in entry]
print(json.dumps({"trl": trl.__version__, "seen": seen, "logged": logged}))
"""


def test_trls_grpo_trains_on_the_judges_rewards(
    judge_url: str, installed: Callable[..., Path], output_of: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    found = output_of(sys.executable, _path(installed("trl==1.16.0")), TRL, judge_url, tiny_model, tmp_path / "out")
    assert found["trl"] == "1.16.0" and len(found["seen"]) == 12 and len(found["logged"]) == 3
    known = [value for value in found["seen"] if value is not None]
    assert known and all(0 <= value <= 1 for value in known)


SWIFT = """
import json, sys
from swift.rewards import orms
from prmkit.rewards.ms_swift import make_orm
orms["judge"] = make_orm(sys.argv[1])
judge = orms["judge"](None)
ask = {"role": "user", "content": "What?"}
said = ["good", "mumble", "bad"]
messages = [[ask, {"role": "assistant", "content": text}] for text in said]
print(json.dumps(judge(said, messages=messages, prompt_id=["a", "a", "a"], trainer_state=None)))
"""
SWIFT_NEEDS = ("ms-swift==4.6.0", "addict==2.4.0", "attrdict==2.0.1", "dacite==1.9.2")


def test_ms_swift_gets_the_mean_of_the_group_for_what_has_no_score(
    judge_url: str, installed: Callable[..., Path], output_of: Callable[..., Any]
) -> None:
    found = output_of(sys.executable, _path(installed(*SWIFT_NEEDS)), SWIFT, judge_url)
    assert found == pytest.approx([GOOD, (GOOD + POOR) / 2, POOR], abs=CLOSE)


VERL = """
import asyncio, json, sys
import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager

path, model = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
function = {"path": path, "name": "compute_score", "reward_kwargs": {}}
config = OmegaConf.create({"reward": {
    "custom_reward_function": function,
    "reward_manager": {"source": "register", "name": "naive", "module": None},
}})
found = []
async def score():
    manager = load_reward_manager(config, tokenizer)
    for said in ("good", "bad", "mumble"):
        ids = torch.tensor([tokenizer.encode(said, add_special_tokens=False)])
        asked = np.array([{"role": "user", "content": "What?"}], dtype=object)
        data = DataProto.from_dict(
            tensors={"responses": ids, "attention_mask": torch.ones_like(ids)},
            non_tensors={
                "data_source": np.array(["x"], dtype=object),
                "reward_model": np.array([{"ground_truth": ""}], dtype=object),
                "extra_info": np.array([{"prompt": asked}], dtype=object),
            },
        )
        found.append(await manager.run_single(data))
asyncio.run(score())
print(json.dumps(found))
"""
VERL_NEEDS = (
    "verl==0.9.1", "ray==2.60.0", "tensordict", "hydra-core", "codetiming", "dacite", "pyvers", "msgpack", "jsonschema",
    "referencing", "rpds-py", "jsonschema-specifications",
)  # fmt: skip


@pytest.mark.huge
def test_verls_reward_manager_gets_a_number_and_the_same_keys_each_time(
    judge_url: str, installed: Callable[..., Path], output_of: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    made = f"make_compute_score({judge_url!r}, unscored_reward=0.5)"
    file = tmp_path / "reward.py"
    file.write_text(f"from prmkit.rewards.verl import make_compute_score\ncompute_score = {made}\n")
    good, poor, unsure = output_of(sys.executable, _path(installed(*VERL_NEEDS)), VERL, file, tiny_model)
    scores = [each["reward_score"] for each in (good, poor, unsure)]
    assert scores == pytest.approx([GOOD, POOR, 0.5], abs=CLOSE)
    assert good["reward_extra_info"].keys() == unsure["reward_extra_info"].keys()
    assert unsure["reward_extra_info"]["unscored"] == 1.0


INSPECT = """
import json, sys
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser
from inspect_ai.solver import solver
from prmkit.rewards.inspect_ai import judge_scorer

@solver
def replay():
    async def solve(state, generate):
        for said in state.metadata["said"]:
            state.messages.append(ChatMessageAssistant(content=said, source="generate"))
        return state
    return solve

example = [ChatMessageUser(content="Do that."), ChatMessageAssistant(content="good"), ChatMessageUser(content="Do it.")]
samples = [
    Sample(input=given, metadata={"said": said.split(",")})
    for said in ("good", "bad", "mumble", "", "good,bad")
    for given in ("Do it.", example)
]
task = Task(dataset=samples, solver=replay(), scorer=judge_scorer(sys.argv[1], aggregate="mean"))
(log,) = eval(task, model="mockllm/model", log_dir=sys.argv[2], display="none")
(found,) = log.results.scores
values = [each.scores["prmkit_judge"].value for each in log.samples]
steps = [len((each.scores["prmkit_judge"].metadata or {}).get("steps", ())) for each in log.samples]
print(json.dumps({"status": log.status, "values": values, "steps": steps, "unscored": found.unscored_samples}))
"""


@pytest.mark.huge
def test_inspect_leaves_a_sample_without_a_score_out_of_its_mean(
    judge_url: str, installed_alone: Callable[..., Path], output_of: Callable[..., Any], tmp_path: Path
) -> None:
    python = installed_alone("inspect-ai==0.3.285")  # its pins are not ours
    found = output_of(python, ROOT, INSPECT, judge_url, tmp_path / "logs")
    assert (found["status"], found["unscored"], found["steps"]) == ("success", 4, [1, 1, 1, 1, 0, 0, 0, 0, 2, 2])
    scored = [*found["values"][:4], *found["values"][8:]]
    assert scored == pytest.approx([GOOD, GOOD, POOR, POOR, *[(GOOD + POOR) / 2] * 2], abs=CLOSE)


VERIFIERS = """
import asyncio, json, sys
import verifiers.v1 as vf
from verifiers.v1.graph import MessageNode
from verifiers.v1.trace import AgentInfo, Trace, TraceTask
from verifiers.v1.types import AssistantMessage, ToolCall, ToolMessage, UserMessage
from prmkit.rewards.verifiers import make_reward

class Judged(vf.Task[vf.TaskData, vf.State]):
    judged = make_reward(sys.argv[1], weight=2.0)

def traced(*messages):
    data = vf.TaskData(prompt="Do it.")
    trace = Trace(task=TraceTask(type="Judged", data=data), agent=AgentInfo(config=vf.AgentConfig()))
    for place, (message, sampled) in enumerate(messages):
        trace.nodes.append(MessageNode(parent=place - 1 if place else None, message=message, sampled=sampled))
    return data, trace

def said(text, sampled=True, **more):
    return AssistantMessage(content=text, **more), sampled

call = ToolCall(id="c1", name="look", arguments="{}")
asked = (UserMessage(content="Do it."), False)
found = []
for messages in (
    [asked, said("bad", sampled=False), said("good")],
    [asked, said("good", tool_calls=[call]), (ToolMessage(tool_call_id="c1", content="found"), False), said("bad")],
    [asked, said("good"), said("mumble")],
    [asked],
):
    data, trace = traced(*messages)
    try:
        asyncio.run(Judged(data).score(trace))
        reward = trace.rewards["judge_reward"]
        found.append([reward.score, reward.value, trace.info["judge_steps"]])
    except vf.TaskError as error:
        found.append([str(error), trace.rewards["judge_reward"], trace.info["judge_steps"]])
print(json.dumps(found))
"""


@pytest.mark.huge
def test_verifiers_gets_a_reward_of_what_the_model_wrote_and_an_error_for_what_has_no_score(
    judge_url: str, installed_alone: Callable[..., Path], output_of: Callable[..., Any]
) -> None:
    good, poor, *unscored = output_of(installed_alone("verifiers==0.4.0"), ROOT, VERIFIERS, judge_url)
    assert good == [_near(GOOD), _near(2 * GOOD), [_near(GOOD)]]  # not of the message in its prompt
    assert poor == [_near(POOR), _near(2 * POOR), [_near(GOOD), _near(POOR)]]
    for message, reward, steps in unscored:
        assert "no reliable score" in message and reward is None  # and not 0
        assert steps in ([_near(GOOD), None], [])


SKYRL = """
import json, sys
import skyrl_gym
from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput
from prmkit.rewards.skyrl import make_env

class Game(BaseTextEnv):
    def step(self, action):
        self.turns += 1
        seen = [{"role": "user", "content": "Go on."}]
        return BaseTextEnvStepOutput(observations=seen, reward=0.5, done=self.turns == 3, metadata={})

judged = make_env(Game, sys.argv[1], weight=2.0)
skyrl_gym.register(id="judged", entry_point=judged)
env = skyrl_gym.make("judged")
env.init([{"role": "system", "content": "Play."}, {"role": "user", "content": "Do it."}])
rewards = [env.step(text)["reward"] for text in ("good", "bad")]
for text in ("mumble", ""):
    try:
        env.step(text)
    except Exception as error:
        rewards.append(type(error).__name__)
print(json.dumps(rewards))
"""


@pytest.mark.huge
def test_every_turn_of_a_skyrl_environment_earns_its_score(
    judge_url: str, installed_alone: Callable[..., Path], output_of: Callable[..., Any]
) -> None:
    found = output_of(installed_alone("skyrl-gym==0.4.0"), ROOT, SKYRL, judge_url)
    assert found == [_near(0.5 + 2 * GOOD), _near(0.5 + 2 * POOR), "JudgeUnavailable", "JudgeUnavailable"]


def _near(value: float) -> Any:
    return pytest.approx(value, abs=2 * CLOSE)


def _path(overlay: Path) -> str:
    return os.pathsep.join([str(overlay), str(ROOT)])
