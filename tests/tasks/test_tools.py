"""TRL's environments and tools: told to a model, called as it asks, whatever it asks, and scored."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import games
import h5py
import pytest
import small
import tiny

from mpies import config
from mpies.engines.tools import Chat, Tools
from mpies.errors import InputError
from mpies.tasks import making
from mpies.tasks.episodes import Episode, Start, Turn

pytestmark = pytest.mark.lengthy

FILE = str(Path(games.__file__))
ASKED = [{"role": "user", "content": "Go."}]


def settings(factory="", tools=(), **others) -> config.TaskSettings:
    def full(name):
        return f"{FILE}:{name}"

    factories = (
        {n: full(v) for n, v in factory.items()} if isinstance(factory, dict) else factory and full(factory)
    )
    return config.TaskSettings(environment_factory=factories, tools=[full(name) for name in tools], **others)


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def qwen():
    """A tokenizer with Qwen3's chat template and TRL's way to read it."""
    utils = pytest.importorskip("trl.chat_template_utils")
    template = Path(utils.__file__).parent / "chat_templates" / "qwen3.jinja"
    made = tiny.byte_tokenizer(template.read_text())
    return utils.add_response_schema(made)


def dialogue(task, tokenizer, answers: list[list[str]], rows=None, seeds=None) -> list[Episode]:
    """Episodes in which the model says these answers, one list for each."""
    rows = rows or task.train[: len(answers)]
    episodes = [Episode(Start(row, seed)) for row, seed in zip(rows, seeds or [0] * len(rows), strict=True)]
    with task.environments.open(episodes, SimpleNamespace(tools=Tools(tokenizer))) as stage:
        for i, reply in stage.begin().items():
            episodes[i].take(reply)
        for turn in range(max(map(len, answers))):
            live = [i for i, one in enumerate(episodes) if not one.ended and turn < len(answers[i])]
            said = {
                i: Turn(episodes[i].conversation, answers[i][turn], encode(tokenizer, answers[i][turn]))
                for i in live
            }
            for i, one in said.items():
                episodes[i].turns.append(one)
            for i, reply in stage.step(said).items():
                episodes[i].take(reply)
        stage.finish()
    return episodes


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def results(episode: Episode) -> list[str]:
    return [message["content"] for message in episode.conversation if message["role"] == "tool"]


@pytest.fixture(scope="module")
def increment():
    return making.make(settings("IncrementEnv", ["multiply"], train_size=4))


def test_tools_are_called_until_the_model_calls_none(increment, tokenizer):
    target = int(dialogue(increment, tokenizer, [[]])[0].prompt[0]["content"].split()[-1][:-1])
    (one, other) = dialogue(
        increment,
        tokenizer,
        [
            [
                call("increment", step=target - 1) + call("multiply", a=6, b=7),
                call("increment", step=1),
                "Done.",
            ],
            ["I do nothing."],
        ],
    )
    assert results(one) == [str(target - 1), "42", str(target)]
    assert (one.ended, one.reward, other.ended, other.reward) == ("done", 1.0, "done", 0.0)
    roles = ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]
    assert [message["role"] for message in one.conversation] == roles
    assert one.conversation[1]["tool_calls"][1]["function"] == {
        "name": "multiply",
        "arguments": {"a": 6, "b": 7},
    }
    assert sum(reply.calls for reply in one.replies) == 3
    assert sum(reply.bad_calls for reply in one.replies) == 0


DEEP = "[" * 100_000


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    "answer, said",
    [
        (call("fly", to="Rome"), "Tool fly not found."),
        (call("increment", step="two"), "unsupported operand"),
        (call("increment", step=1, stop=2), "unexpected keyword argument"),
        (call("increment", step={"a": [1] * 300_000}), "unsupported operand"),
        ("<tool_call>{'name': 'increment'}</tool_call>", "a call is no JSON"),
        (f'<tool_call>{{"name": "increment", "arguments": {DEEP}</tool_call>', "a call is no JSON"),
        (
            f'<tool_call>{{"name": "increment", "arguments": {{"step": {DEEP}{"]" * 100_000}}}}}</tool_call>',
            "is no JSON",
        ),
        ('<tool_call>{"name": "increment", "arguments": [1]}</tool_call>', "have to be an object"),
        ('<tool_call>{"name": ["increment"]}</tool_call>', 'a call needs a "name"'),
        ("<tool_call>7</tool_call>", 'a call needs a "name"'),
        (
            '<tool_call>{"name": "increment", "arguments": {"step": "\\ud800"}}</tool_call>',
            "a call is no text",
        ),
        ('<tool_call>{"name": "increment", "arguments": {"\\udfff": 1}}</tool_call>', "a call is no text"),
        ('<tool_call>{"name": "\\ud800"}</tool_call>', "a call is no text"),
        (call("increment", step=nested(200)), "nested more than 64 times"),
        ("<tool_call>" * 100_000, "100000 calls in one answer; allowed are 16"),
        ('<tool_call>{"name": "increment"', "<tool_call> without </tool_call>"),
        ('<tool_call>{"name": "increment", "arguments": {"step": 1e999}}</tool_call>', "is not finite"),
        ('<tool_call>{"name": "increment", "arguments": {"step": NaN}}</tool_call>', "is not finite"),
        ('<tool_call>{"name": "reset", "arguments": {}}</tool_call>', "Tool reset not found."),
        ('<tool_call>{"name": "__class__", "arguments": {}}</tool_call>', "Tool __class__ not found."),
    ],
)
def test_what_is_no_call_goes_back_to_the_model(increment, tokenizer, answer, said):
    start = time.process_time()
    (one,) = dialogue(increment, tokenizer, [[answer, "Sorry."]])
    assert time.process_time() - start < 10
    assert (one.ended, sum(r.bad_calls for r in one.replies)) == ("done", 1)
    assert said in results(one)[0]
    assert all(len(text) < 1200 for text in results(one))


def test_answers_are_read_as_trl_reads_them(increment, qwen):
    utils = pytest.importorskip("trl.chat_template_utils")
    tools = Tools(qwen)
    assert tools.format is None and tools.shows and tools.tells_several
    (one,) = dialogue(increment, qwen, [[]])
    prompt = one.prompt
    good = call("increment", step=3)
    for text in (
        "Yes.",
        good,
        f"<think>So.</think>I call. {good}{call('multiply', a=1, b=2)}",
        "<tool_call>no</tool_call>",
    ):
        ids = encode(qwen, text)
        theirs = utils.parse_response(qwen, ids, tools.written(prompt), prompt.tools)
        message, problems = tools.read(ids, text, prompt)
        assert bool(problems) == (text == "<tool_call>no</tool_call>")
        assert message == theirs
    (one,) = dialogue(increment, qwen, [[good, "Done."]])
    assert results(one) == ["3"]
    start = time.process_time()
    for text in ("<tool_call>" * 20_000, f"<tool_call>{DEEP}", call("increment", step="x" * 10**6)):
        tools.read(encode(qwen, text), text, prompt)
    assert time.process_time() - start < 30


@pytest.mark.parametrize("value", ["\ud800", nested(900)], ids=["half of a character", "nested"])
def test_what_a_call_says_can_be_told_the_model_again(increment, qwen, value):
    """By a template that writes calls from their parts."""
    (one,) = dialogue(increment, qwen, [[call("increment", step=value), "Sorry."]])
    assert encode(qwen, Tools(qwen).written(one.conversation))
    assert sum(reply.bad_calls for reply in one.replies) == 1


def test_models_are_told_of_tools_by_their_template_or_in_words(increment, tokenizer, qwen):
    for made in (tokenizer, qwen):
        (one,) = dialogue(increment, made, [[call("increment", step=2), call("fly")]])
        text = Tools(made).written(one.conversation)
        for part in (
            "Increment the internal counter",
            "multiply",
            "not found",
            '{"name": "increment", "argum',
        ):
            assert part in text
    assert "<tool_response>" in text
    plain = Tools(tokenizer).written(Chat(ASKED, []))
    assert plain == "<bos>user: Go.<eos><bos>assistant: "


def test_describing_tools_may_take_the_addresses_that_an_episode_may_not():
    """transformers imports torch for it, and torch for CUDA takes many."""
    with pytest.raises(InputError, match="reset raised OSError: Cannot allocate memory"):
        making.make(settings("Spacious", train_size=2))


def test_a_tool_that_hangs_ends_its_episode(tokenizer):
    task = making.make(settings("IncrementEnv", ["hang"], train_size=2, call_seconds=1))
    one, other = dialogue(task, tokenizer, [[call("hang", seconds=1000)], [call("increment", step=1), "a"]])
    assert (one.ended, one.error) == ("failed", "use has not returned after 10 s")
    assert other.ended == "done"


def test_reward_functions_look_at_environments_which_may_be_async(tmp_path, runs_of):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": ASKED, "target": n}) for n in (3, 4)))
    made = runs_of(
        task__environment_factory=f"{FILE}:Patient", task__train_data=rows, task__reward="{games:looks: 2}"
    )
    (played,) = made.task.play(made.engine, made.task.starts(0))
    assert played.scores.rewards.tolist() == [-3 + 2 * 10.03, -4 + 2 * 10.04]
    assert games.given["target"] == [3, 4]
    (one, _) = dialogue(
        made.task, made.tokenizer, [[call("note", text="a"), call("note", text="b"), "."], ["."]]
    )
    assert results(one) == ["1 noted", "2 noted"] and one.reward == -3


def test_rows_choose_among_several_environments(tokenizer, tmp_path):
    rows = [{"environment": "count"}, {"environment": "wait", "prompt": ASKED, "target": 2}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    task = making.make(settings({"count": "IncrementEnv", "wait": "Patient"}, train_data=str(file)))
    one, two = dialogue(task, tokenizer, [[call("note", text="a")], [call("note", text="a"), "."]])
    assert "Tool note not found." in results(one)[0] and results(two) == ["1 noted"]
    assert [t["function"]["name"] for t in one.prompt.tools] == ["increment"]


@pytest.fixture
def runs_of(alone, tiny_model, tmp_path):
    """runs_of(setting=value, ...) -> a replica."""
    with small.Runs(alone, tiny_model(), tmp_path) as runs:
        own = {"task__name": "custom", "task__reward": {}, "task__train_data": "", "task__eval_data": ""}
        yield lambda **changes: runs.build(**(own | changes))


@pytest.mark.parametrize(
    "given, said",
    [
        (settings("Echo", train_size=1), "task.environment_factory: "),
        (settings("Missing", train_size=1), "task.environment_factory: "),
        (settings(tools=["missing"], train_size=1, reward={"games:more": 1.0}), "task.tools: "),
        (settings(tools=["more"], train_size=1, reward={"games:more": 1.0}), "task.tools: describe raised "),
        (settings(tools=["multiply"], train_size=1), "task.reward: missing"),
        (settings("IncrementEnv", ["multiply", "multiply"], train_size=1), "task.tools: two of them have"),
        (
            settings("Patient", ["note"], train_size=1),
            "task.environment_factory: 'note' is a method of the environment's, and one of task.tools",
        ),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(InputError) as error:
        making.make(given)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_run_with_tools(alone, tiny_model, tmp_path):
    own = {"task__name": "custom", "task__reward": {}, "task__train_data": "", "task__eval_data": ""}
    own |= {"task__environment_factory": f"{FILE}:Short"}
    with small.Runs(alone, tiny_model(), tmp_path) as runs:
        reward = {"task__reward": "{games:more: 1}"}
        assert runs.train(1, **(own | reward | {"task__train_size": 2, "task__eval_size": 1})) == 0
        with h5py.File(runs.folder / "run.h5") as file:
            assert (file["member/turns"][0] == 2).all()
            assert list(json.loads(file["start/rewards"].asstr()[0])) == ["games:more", f"{FILE}:Short"]
