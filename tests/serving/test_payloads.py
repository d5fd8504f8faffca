"""What trainers and clients send, taken apart into runs."""

from pathlib import Path
from typing import Any

import pytest
from families import TEMPLATES

from prmkit.errors import DataError
from prmkit.prompts.encoding import load_encoding
from prmkit.serving.payloads import run_of_policy, run_of_step, runs_in

CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": {"city": "Bern"}}}
CHAT = [
    {"role": "user", "content": "What is the weather in Bern?"},
    {"role": "assistant", "content": "I look it up."},
    {"role": "user", "content": "Go ahead."},
    {"role": "assistant", "content": "It rains."},
]


@pytest.mark.parametrize("family", TEMPLATES)
def test_what_a_chat_template_writes_is_read_back(family: str, model_folders: dict[str, Path]) -> None:
    encoding = load_encoding(model_folders[family], TEMPLATES[family])
    turns = encoding.template.encode_multiturn(encoding.tokenizer, CHAT)
    *before, last = [encoding.tokenizer.decode(ids) for turn in turns for ids in turn]
    prompt = "".join(before)
    whole = prompt + last
    run, earlier = run_of_policy(prompt, whole, includes_prompt=True)
    assert earlier == 1
    assert [step.text for step in run.steps] == ["I look it up.", "It rains."]
    assert run.task == "What is the weather in Bern?" and run.steps[1].incoming[0].text == "Go ahead."
    assert run_of_policy(prompt, whole[len(prompt) :], includes_prompt=False) == (run, earlier)


def test_tool_calls_and_results_inside_a_response_belong_to_their_steps() -> None:
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
    response = (
        "<think>I need a tool.</think>\n<tool_call>\n"
        '{"name": "look_up", "arguments": {"city": "Bern"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nIt rains.<|im_end|>"
    )
    run, earlier = run_of_policy(prompt, prompt + response, includes_prompt=True)
    assert (earlier, run.system, run.task) == (0, "Be brief.", "Weather?")
    first, second = run.steps
    assert first.thought == "I need a tool." and first.calls[0].name == "look_up"
    assert [result.text for result in first.results] == ["rain"] and second.text == "It rains."
    assert run_of_policy(prompt, response, includes_prompt=False) == (run, 0)
    after_messages, _ = run_of_policy(CHAT[:1], response, includes_prompt=False)
    assert [(step.calls, step.results, step.text) for step in after_messages.steps] == [
        (step.calls, step.results, step.text) for step in run.steps
    ]


def test_an_answer_that_is_still_open_in_the_prompt_is_the_policys() -> None:
    prompt = "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    run, earlier = run_of_policy(prompt, f"{prompt}I guess.</think>\nRain.<|im_end|>", includes_prompt=True)
    assert (earlier, run.steps[0].thought, run.steps[0].text) == (0, "I guess.", "Rain.")


def test_plain_text_is_a_task_and_one_answer_or_tagged_steps() -> None:
    run, _ = run_of_policy("What is 2 + 2?", "What is 2 + 2?\n4</s>", includes_prompt=True)
    assert (run.task, [step.text for step in run.steps]) == ("What is 2 + 2?", ["4"])
    tagged = (
        '<think>look</think><tool_call>{"name": "f", "arguments": {}}</tool_call><result>7</result><answer>7</answer>'
    )
    run, _ = run_of_policy("How many?", tagged, includes_prompt=False)
    assert [step.calls[0].name if step.calls else step.text for step in run.steps] == ["f", "7"]


@pytest.mark.parametrize(
    ("prompt", "written", "says"),
    [
        ("What is 2 + 2?", "4", "does not begin with its prompt"),
        ("What?", "What?   ", "the run contains no agent step"),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "", "the response is empty"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(prompt: str, written: str, says: str) -> None:
    whole = written if "assistant" not in prompt else prompt + written
    with pytest.raises(DataError, match=says):
        run_of_policy(prompt, whole, includes_prompt=True)
    with pytest.raises(DataError, match="prompt must be a string or a list of messages"):
        run_of_policy([1, 2], "x", includes_prompt=False)


def test_a_step_is_the_last_one_of_its_run_if_it_calls_no_tool() -> None:
    item: dict[str, Any] = {"task": "Weather?", "history": CHAT[1:3], "step": CHAT[3]}
    run = run_of_step(item)
    assert [step.text for step in run.steps] == ["I look it up.", "It rains."] and run.steps[-1].last
    assert not run_of_step(item | {"last": False}).steps[-1].last
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert not run_of_step({"task": "Weather?", "step": calling}).steps[-1].last
    results = [calling, {"role": "tool", "tool_call_id": "c1", "content": "rain"}]
    assert run_of_step({"task": "Weather?", "step": results}).steps[-1].results[0].text == "rain"


@pytest.mark.parametrize(
    "item",
    [{}, {"task": "", "step": CHAT[1]}, {"task": "x"}, {"task": "x", "step": CHAT[0]}, {"task": "x", "step": "text"},
     {"task": "x", "step": CHAT[1], "history": "text"}, {"task": 7, "step": CHAT[1]}],
)  # fmt: skip
def test_a_step_that_is_none_is_one_sentence(item: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        run_of_step(item)


def test_runs_come_in_every_form() -> None:
    for body in (CHAT, {"messages": CHAT}, [{"messages": CHAT}], {"simulations": [{"messages": CHAT, "task_id": "t"}]}):
        runs, _ = runs_in(body, None)
        assert [[step.text for step in run.steps] for run in runs] == [["I look it up.", "It rains."]]
    for body in ({}, [], {"messages": CHAT[:1]}, "text", {"conversations": 7}):
        with pytest.raises(DataError, match=r"^the request(?!.*(/tmp|--format))"):
            runs_in(body, None)


def test_whether_a_step_is_the_last_is_true_or_false() -> None:
    step = {"task": "t", "step": {"role": "assistant", "content": "a"}}
    assert not run_of_step(step | {"last": False}).steps[-1].last
    with pytest.raises(DataError, match="last must be true or false"):
        run_of_step(step | {"last": "false"})
