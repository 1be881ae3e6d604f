"""Calls of tools in models' own formats: read as they are written, or the model is told of another format."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import tiny

from mpies.engines.calls import FORMATS, PLAIN, UnreadableCallError
from mpies.engines.tools import Chat, Tools
from mpies.errors import InputError

utils = pytest.importorskip("trl.chat_template_utils")
TEMPLATES = Path(utils.__file__).parent / "chat_templates"
_, BARE, QWEN, GLM = FORMATS

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "where": {"type": "string", "description": "A place."},
                "often": {"type": "integer", "description": "How often."},
                "kinds": {"type": "array", "items": {"type": "string"}, "description": "Of things."},
                "dark": {"type": "boolean", "nullable": True, "description": "At night?"},
            },
        },
    },
}
CHAT = Chat([{"role": "user", "content": "Look."}], [TOOL])
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKS_ONLY = (
    "{% if tools %}<|im_start|>system\nWrite calls within <tool_call></tool_call> XML tags:\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n{{ tools | tojson }}<|im_end|>\n{% endif %}'
    + SMOLLM2
)


def template(name: str) -> str:
    return {"smollm2": SMOLLM2, "asks only": ASKS_ONLY}.get(name) or (TEMPLATES / f"{name}.jinja").read_text()


def called(**arguments) -> dict:
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


def read(tools: Tools, text: str, chat: Chat = CHAT):
    ids = tools.tokenizer(text, add_special_tokens=False)["input_ids"]
    return tools.read(ids, text, chat)


def gone_on(tools: Tools, text: str) -> str:
    """What the model is given after this answer, each of whose calls has a result."""
    message, problems = read(tools, text)
    assert not problems
    results = [
        {"role": "tool", "name": "look", "content": f"seen {i}"} for i in range(len(message["tool_calls"]))
    ]
    return tools.written(CHAT.with_messages(message, *results))


OWN = {
    "qwen2_5": (PLAIN, '<tool_call>\n{"name": "look", "arguments": {"where": "7"}}\n</tool_call>'),
    "qwen3": (
        PLAIN,
        '<think>A <tool_call>?</think><tool_call>{"name": "look", "arguments": {"where": "7"}}</tool_call>',
    ),
    "asks only": (PLAIN, '<tool_call>{"name": "look", "arguments": {"where": "7"}}</tool_call>'),
    "llama3_1": (BARE, '{"name": "look", "parameters": {"where": "7"}}'),
    "llama3_2": (BARE, 'I do. {"type": "function", "name": "look", "parameters": {"where": "7"}}'),
    "qwen3_5_think": (
        QWEN,
        "So.</think>\n\n<tool_call>\n<function=look>\n<parameter=where>\n7\n</parameter>\n</function>\n</tool_call>",
    ),
    "qwen3_5_nothink": (QWEN, "<function=look><parameter=where>7</parameter></function>"),
    "nemotron_3_nano": (
        QWEN,
        "<tool_call><function=look><parameter=where>7</parameter></function></tool_call>",
    ),
    "glm4moe": (
        GLM,
        "<tool_call>look\n<arg_key>where</arg_key>\n<arg_value>7</arg_value>\n</tool_call>",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_calls_are_read_in_the_format_that_the_template_asks_for(name):
    format, text = OWN[name]
    tools = Tools(tiny.byte_tokenizer(template(name)))
    assert tools.shows and tools.format is format
    assert "You can call tools" not in tools.written(CHAT)
    message, problems = read(tools, text)
    assert (message["tool_calls"], problems) == ([called(where="7")], [])
    assert "seen 0" in gone_on(tools, text)
    for answer in ("Nothing.", 'It is {"name": "Ann"}.', "<b>1</b> < 2"):
        assert read(tools, answer) == ({"role": "assistant", "content": answer}, [])


@pytest.mark.parametrize("name", ["gemma3", "smollm2", "lfm2", "muse_glimmer", "deepseekv3", "gptoss"])
def test_who_knows_no_tools_or_writes_calls_as_nobody_reads_is_told_in_words(name):
    tools = Tools(tiny.byte_tokenizer(template(name)))
    assert tools.format is PLAIN and not tools.shows
    assert tools.written(CHAT).count("You can call tools") == 1 and '"look"' in tools.written(CHAT)
    two = "<tool_call>" + json.dumps([called(often=i)["function"] for i in range(2)]) + "</tool_call>"
    told = gone_on(tools, f"Two. {two}")
    assert told.count("seen 0") == told.count("seen 1") == told.count("Two. <tool_call>[{") == 1


def test_every_template_is_told_in_a_way_that_is_read():
    """Of those that TRL knows: a call and two, as they are asked for, with results."""
    names = sorted(file.stem for file in TEMPLATES.glob("*.jinja") if "training" not in file.name)
    assert len(names) > 30
    for name in names:
        if name in ("idefics3", "llava_next", "smolvlm"):  # which take content in parts only
            continue
        tools = Tools(tiny.byte_tokenizer(template(name)))
        write = tools.format.write
        for calls in ([called(where="7")], [called(often=2), called(where="x", often=3)]):
            if tools.format in (PLAIN, BARE):
                text = "\n".join(map(write, calls))
            else:
                message = {"role": "assistant", "content": "", "tool_calls": calls}
                text = tools.written(CHAT.with_messages(message)).rpartition("Look.")[2]
            assert read(tools, text)[0]["tool_calls"] == calls
            told = gone_on(tools, text)
            assert "Looks at a place." in told
            for number in range(len(calls)):
                assert told.count(f"seen {number}") == 1


def test_where_a_template_writes_one_call_only_more_stay_as_they_were_written():
    """Llama's refuses the second: the job would end."""
    tools = Tools(tiny.byte_tokenizer(template("llama3_2")))
    two = '{"name": "look", "parameters": {"often": 1}}; {"name": "look", "parameters": {"often": 2}}'
    message, _ = read(tools, two)
    assert message["tool_calls"] == [called(often=1), called(often=2)]
    assert two in gone_on(tools, two)
    clients = {"role": "assistant", "content": "", "tool_calls": message["tool_calls"]}
    assert two.replace("; ", "\n") in tools.written(CHAT.with_messages(clients))


def test_results_and_what_a_user_says_with_them_are_one_message_where_they_are_text():
    tools = Tools(tiny.byte_tokenizer(template("gemma3")))
    said = [
        {"role": "assistant", "content": "", "tool_calls": [called(often=1), called(often=2)]},
        *({"role": "tool", "name": "look", "content": text} for text in "ab"),
        {"role": "user", "content": "Well?"},
    ]
    told = tools.written(CHAT.with_messages(*said))
    assert told.count("<start_of_turn>user") == 2
    assert "a\n</tool_response>\n<tool_response>\nb\n</tool_response>\nWell?" in told


@pytest.mark.parametrize("name", ["gemma4", "gptoss"])
def test_what_could_not_be_read_is_told_where_results_are_written_after_calls_only(name):
    tools = Tools(utils.add_response_schema(tiny.byte_tokenizer(template(name))))
    assert tools.format is None and tools.tells_calls
    bad = [{"role": "assistant", "content": "Hm"}, {"role": "tool", "name": "unknown", "content": "no JSON"}]
    assert "<tool_response>\nno JSON" in tools.written(CHAT.with_messages(*bad))


def test_a_response_template_that_does_not_read_what_is_asked_for_is_not_used():
    made = tiny.byte_tokenizer(template("qwen3"))
    made.response_template = utils.llama3_template
    assert Tools(made).format is PLAIN


@pytest.mark.parametrize(
    "raw, said",
    [
        ("<parameter=often>\n7\n</parameter>", {"often": 7}),
        ("<parameter=where>\n 7\n\n</parameter>", {"where": " 7\n"}),
        ('<parameter=kinds>["a"]</parameter>', {"kinds": ["a"]}),
        ("<parameter=dark>True</parameter>", {"dark": True}),
        ("<parameter=dark>None</parameter>", {"dark": None}),
        ("<parameter=often>many</parameter>", {"often": "many"}),
        ("<parameter=unknown>7</parameter>", {"unknown": "7"}),
        ("<parameter=where></function></parameter>", {"where": "</function>"}),
        ("", {}),
    ],
)
def test_arguments_without_marks_of_their_own_have_the_types_of_the_schema(raw, said):
    calls, before = QWEN.read(f"Yes. <tool_call><function=look>{raw}</function></tool_call>", [TOOL])
    assert (calls, before) == ([called(**said)], "Yes.")


HOSTILE = [
    (QWEN, "<tool_call>" * 50_000, "no name"),
    (QWEN, "<tool_call>\n{}", "no name"),
    (QWEN, "<function=look>" * 50_000, "not ended"),
    (QWEN, "<function=look>" + "<parameter=a>" * 50_000, "without </parameter>"),
    (QWEN, "<function=look>" + "<parameter=a></parameter>" * 50_000, "not ended"),
    (QWEN, "<function=look></function>" * 50_000, "17 calls in one answer"),
    (QWEN, "<function=look><parameter=often>NaN</parameter></function>", "not finite"),
    (GLM, "<tool_call>" + "a" * 500_000, "not ended"),
    (GLM, "<tool_call>{}", "no name"),
    (BARE, '{"name": ' * 50_000, "no JSON"),
    (BARE, '{"name": "a", "parameters": ' + "[" * 500_000, "no JSON"),
    (BARE, '{"name": "a", "parameters": 7}', "have to be an object"),
    (BARE, '{"name": 3, "parameters": {}}', 'needs a "name"'),
    (BARE, '{"name": "a", "parameters": {"b": 1e999}}', "not finite"),
    (BARE, "{" + " " * 500_000, None),
    (PLAIN, "<tool_call>[" + "{}," * 50_000 + "{}]</tool_call>", 'needs a "name"'),
    (PLAIN, '<tool_call>{"name": "a", "arguments": {"b": NaN}}</tool_call>', "not finite"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_whatever_a_model_writes_costs_bounded_time(number):
    format, text, said = HOSTILE[number]
    start = time.process_time()
    try:
        assert format.read(text, [TOOL]) == ([], text) and said is None
    except UnreadableCallError as error:
        assert said in str(error) and len(str(error)) < 300
    assert time.process_time() - start < 5


def test_a_thought_that_was_cut_off_calls_nothing():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = SMOLLM2
    called = 'I could say <tool_call>{"name": "look", "arguments": {"where": "up"}}</tool_call>'
    tools = Tools(tokenizer)
    message, problems = tools.read([], f"<think>{called}", CHAT)
    assert "tool_calls" not in message and not problems
    for text in (f"<think>{called}, so</think>{called}", called):
        assert len(tools.read([], text, CHAT)[0]["tool_calls"]) == 1


DATED = (
    "{%- if strftime_now is defined %}{{ strftime_now( '%d %b %Y' ) + strftime_now(\"-%Y\") }}{%- endif %}"
)


def test_the_day_that_a_template_writes_is_always_the_same():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = DATED + "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert Tools(tokenizer).written(Chat([{"role": "user", "content": "?"}], [])) == "26 Jul 2024-2024?"
    tokenizer.chat_template = "{% set day = strftime_now %}{{ day('%d') }}"
    with pytest.raises(InputError, match="writes the time of day"):
        Tools(tokenizer).written(Chat([{"role": "user", "content": "?"}], []))
