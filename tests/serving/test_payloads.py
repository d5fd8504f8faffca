"""What trainers and clients send, taken apart into runs."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from families import TEMPLATES

from prmkit.errors import DataError
from prmkit.prompts.encoding import load_encoding
from prmkit.serving.payloads import NothingWritten, run_of_policy, run_of_step, runs_in

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


FAMILIES = {
    "ChatML": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n",
        '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>\n<|im_start|>user\n'
        "<tool_response>7</tool_response><|im_end|>\n<|im_start|>assistant\nIt rains.<|im_end|>",
    ),
    "Phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Weather?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
        '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|><|im_start|>tool<|im_sep|>7<|im_end|>'
        "<|im_start|>assistant<|im_sep|>It rains.<|im_end|>",
    ),
    "Llama 3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nWeather?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        '<|python_tag|>{"name": "f", "parameters": {"x": 1}}<|eom_id|><|start_header_id|>ipython<|end_header_id|>\n\n7'
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nIt rains.<|eot_id|>",
    ),
    "Llama 3 without a tag": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nWeather?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        '{"name": "f", "parameters": {"x": 1}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n7'
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nIt rains.<|eot_id|>",
    ),
    "Mistral v3": (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST] Weather?[/INST]",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "abc"}]</s>[TOOL_RESULTS] 7[/TOOL_RESULTS]'
        " It rains.</s>",
    ),
    "Mistral v11": (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Weather?[/INST]",
        '[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"x": 1}</s>[TOOL_RESULTS]abc[TOOL_CONTENT]7[/TOOL_RESULTS]It rains.</s>',
    ),
    "Llama 2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWeather? [/INST]",
        '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call></s>[TOOL_RESULTS]7[/TOOL_RESULTS]It rains.</s>',
    ),
    "DeepSeek V3": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Weather?<｜Assistant｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        '{"x": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁outputs▁begin｜>'
        "<｜tool▁output▁begin｜>7<｜tool▁output▁end｜><｜tool▁outputs▁end｜>It rains.<｜end▁of▁sentence｜>",
    ),
    "DeepSeek V3.1": (
        "Be brief.<｜User｜>Weather?<｜Assistant｜></think>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
        "<｜end▁of▁sentence｜><｜tool▁output▁begin｜>7<｜tool▁output▁end｜>It rains.<｜end▁of▁sentence｜>",
    ),
    "GLM-4": (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nWeather?<|assistant|>",
        'f\n{"x": 1}<|observation|>\n7<|assistant|>\nIt rains.<|user|>',
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_results_and_system_texts_of_every_family_are_read(family: str) -> None:
    prompt, response = FAMILIES[family]
    run, earlier = run_of_policy(prompt, response, includes_prompt=False)
    assert (run.system, run.task, earlier, run.lost) == ("Be brief.", "Weather?", 0, {})
    first, second = run.steps
    assert [(call.name, call.arguments) for call in first.calls] == [("f", {"x": 1})]
    assert (first.text, [result.text for result in first.results], second.text) == ("", ["7"], "It rains.")
    assert run_of_policy(prompt, prompt + response, includes_prompt=True) == (run, 0)
    assert run_of_policy(prompt.removeprefix("<s>"), prompt + response, includes_prompt=True) == (run, 0)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"Llama 3 without a tag", "GLM-4"}))
def test_a_response_of_any_family_is_read_without_the_tokens_of_its_prompt(family: str) -> None:
    run, _ = run_of_policy([{"role": "user", "content": "Weather?"}], FAMILIES[family][1], includes_prompt=False)
    assert [[call.name for call in step.calls] for step in run.steps] == [["f"], []]
    assert run.steps[0].results[0].text == "7" and run.steps[1].text == "It rains."


HARMONY = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>42<|return|>"
COHERE = "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"


@pytest.mark.parametrize(
    ("prompt", "response", "says"),
    [
        ("<|start|>user<|message|>hi<|end|><|start|>assistant", HARMONY, r"prompt has <\|start\|>"),
        (CHAT[:1], HARMONY, r"response has <\|channel\|>"),
        ("hi", HARMONY, r"response has <\|channel\|>"),
        (
            "<|im_user|>user<|im_middle|>hi<|im_end|><|im_assistant|>assistant<|im_middle|>",
            "42",
            "prompt has <.im_user",
        ),
        (COHERE, "42<|END_OF_TURN_TOKEN|>", "prompt has <.START_OF_TURN"),
        (CHAT[:1], "42<|END_OF_TURN_TOKEN|>", "response has <.END_OF_TURN"),
        ("<bos><|turn>user\nhi<turn|>\n<|turn>model\n", "42<turn|>", "prompt has <.turn>"),
        ("<｜hy_User｜>hi<｜hy_Assistant｜>", "42<｜hy_eos｜>", "prompt has <｜hy_User｜>"),
        ("[|system|]x[|endofturn|]\n[|user|]hi\n[|assistant|]", "42", "prompt has .{2}system"),
        ("his question<|im_end|>\n<|im_start|>assistant\n", "42<|im_end|>", "does not begin with a message"),
        ("his question<|end|>\n<|assistant|>\n", "42", "does not begin with a message"),
        ("his question<|end|><|assistant|>", "42", "does not begin with a message"),
        ("his question [/INST]", "42</s>", "does not begin with a message"),
        ("<|im_start|>critic\nhi<|im_end|>\n", "42", "does not begin with a message"),
        ("<s>[SYSTEM_PROMPT]x", "42", "no complete message"),
        ("<|user|>\nhi", "42", "ends inside a message of user"),
        ("[INST] hi", "42", "ends inside a message of user"),
    ],
)
def test_text_of_a_template_that_is_not_split_is_refused(prompt: Any, response: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        run_of_policy(prompt, response, includes_prompt=False)
    assert not isinstance(caught.value, NothingWritten)
    if isinstance(prompt, str):
        with pytest.raises(DataError, match=says):
            run_of_policy(prompt, prompt + response, includes_prompt=True)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How does <|user|> work?", "It marks the user."),
        ("What do <|im_start|> and <|im_sep|> mean?", "<|im_start|> begins a message."),
        ("Where is [INST] written, and where [/INST] and [TOOL_CALLS]?", "Before and after the user's text: [/INST]."),
        ("What is <|endoftext|> for?", "It is </s> of others."),
        ("Is <｜User｜> a token?", "Yes, as <｜Assistant｜> is."),
        ("Explain `a <| f |> b`.", "It is F#."),
    ],
)
def test_text_that_mentions_a_token_is_plain(question: str, answer: str) -> None:
    run, earlier = run_of_policy(question, answer, includes_prompt=False)
    assert (run.task, [step.text for step in run.steps], earlier) == (question, [answer], 0)
    assert run_of_policy(question, question + answer, includes_prompt=True)[0] == run
    chat = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    after, _ = run_of_policy(chat, answer + "<|im_end|>", includes_prompt=False)
    assert (after.task, [step.text for step in after.steps]) == (question, [answer])


def test_a_prompt_that_does_not_open_the_agents_message_is_followed_by_it() -> None:
    prompt = "<|im_start|>user\nWeather?<|im_end|>\n"
    for response in ("Rain.", "Rain.<|im_end|>", "<|im_start|>assistant\nRain.<|im_end|>"):
        run, earlier = run_of_policy(prompt, response, includes_prompt=False)
        assert (run.task, [step.text for step in run.steps], earlier) == ("Weather?", ["Rain."], 0)
    answered = f"{prompt}<|im_start|>assistant\n<|endoftext|><|im_end|>\n{prompt}<|im_start|>assistant\n"
    run, earlier = run_of_policy(answered, "Rain.", includes_prompt=False)
    assert ([step.text for step in run.steps], earlier) == (["Rain."], 0)
    for nothing in ("", " \n", "<|im_end|>"):
        with pytest.raises(NothingWritten):
            run_of_policy(f"{prompt}<|im_start|>assistant\n<think>\n", nothing, includes_prompt=False)


def test_text_next_to_a_result_in_a_users_message_is_the_users() -> None:
    prompt = "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>\n'
    answered = "<|im_start|>user\nNote.<tool_response>7</tool_response>Hurry.<|im_end|>\n<|im_start|>assistant\nRain."
    run, _ = run_of_policy(prompt, call + answered, includes_prompt=False)
    assert [result.text for result in run.steps[0].results] == ["7"] and run.lost == {}
    assert [message.text for message in run.steps[1].incoming] == ["Note.\nHurry."]


def test_the_tools_of_mistral_are_part_of_its_system_text() -> None:
    prompt = (
        '<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][AVAILABLE_TOOLS][{"name": "f"}][/AVAILABLE_TOOLS][INST]Hi[/INST]'
    )
    run, _ = run_of_policy(prompt, "Hello.</s>", includes_prompt=False)
    assert (run.system, run.task) == ('Be brief.\n\n[{"name": "f"}]', "Hi")


@pytest.mark.parametrize(
    "repeated",
    [
        "[SYSTEM_PROMPT]",
        "[INST] <<SYS>>",
        "[TOOL_RESULTS]",
        "[TOOL_CALLS]",
        "<tool_call>",
        "<｜tool▁call▁begin｜>",
        " ",
    ],
)
def test_text_that_repeats_a_token_without_end_costs_no_time(repeated: str) -> None:
    began = time.monotonic()
    for prompt in ("[INST]Hi[/INST]", "<｜User｜>Hi<｜Assistant｜>", f"[INST]Hi[/INST]{repeated * 9999}"):
        with suppress(DataError):
            run_of_policy(prompt, repeated * 9999, includes_prompt=False)
    assert time.monotonic() - began < 5
