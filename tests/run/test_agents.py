"""Agents: clients of OpenAI's kind, whose requests are a block's turns; refused, limited, told of. The
same on any ranks: test_killed_in_an_episode.py."""

from __future__ import annotations

import errno
import json
import socket
import time
from collections import Counter
from pathlib import Path

import agents
import h5py
import psutil
import pytest

from mpies import config
from mpies.engines.base import Completions
from mpies.errors import InputError
from mpies.es.population import Member
from mpies.replica import Replica
from mpies.tasks import making
from mpies.tasks.environments.agent_stage import Heard
from mpies.tasks.environments.children import Call
from mpies.tasks.environments.fork_server import Beginning
from mpies.tasks.environments.limits import Limits
from mpies.tasks.environments.nursery import Nursery

pytestmark = pytest.mark.lengthy

FILE = str(Path(agents.__file__))
HELPERS = str(Path(FILE).parent)
OWN = {"task__name": "custom", "task__reward": {}, "task__eval_data": "", "task__train_data": ""}
LOWRANK = {"es__perturbation": "lowrank", "es__block": 2, "engine__batch_size": 64}
ASKED = [{"role": "user", "content": "a"}]


class Noted:
    """An engine that notes whose prompts each call has; and says something, if it is told what."""

    def __init__(self, engine, *says: str):
        self.engine, self.says, self.calls, self.prompts = engine, list(says), [], []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def generate(self, prompts, *more):
        return self.generate_each(prompts, [0] * len(prompts), *more)

    def generate_each(self, prompts, members, *more):
        self.calls.append(Counter(members))
        self.prompts += prompts
        if not self.says:
            return self.engine.generate_each(prompts, members, *more)
        text = self.says.pop(0)
        ids = self.engine.text.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Completions([text], [len(ids)], [ids], [False])


@pytest.fixture
def build(runs):
    """build(agent's name, rows, setting=value, ...) -> a replica."""

    def make(name: str, rows: list[dict], **changes) -> Replica:
        file = runs.folder.parent / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        own = {"task__agent": f"{FILE}:{name}", "task__train_data": file}
        return runs.build(**(OWN | own | changes))

    return make


def play(made: Replica, engine=None):
    (played,) = made.task.play(engine or made.engine, made.task.starts(0))
    return played


def body(**more) -> str:
    return json.dumps({"messages": ASKED} | more)


def test_a_block_of_agents_is_answered_in_step_and_as_a_plain_loop_answers(build):
    made = build("run", [{"turns": 3}, {"turns": 1}, {}], **LOWRANK)
    made.perturbation.set([Member(i, 10 + i, 1) for i in range(2)], 0.3)
    engine = Noted(made.engine)
    both = made.task.play(engine, made.task.starts(3), 2)
    assert engine.calls == [{0: 3, 1: 3}, {0: 2, 1: 2}, {0: 1, 1: 1}]
    for member, played in enumerate(both):
        for one, reward in zip(played.episodes, played.scores.rewards, strict=True):
            assert one.ended == "done" and len(one.conversation) == 2 * len(one.turns)
            total = 0.0
            for number, turn in enumerate(one.turns):
                answer = made.engine.generate_each([one.conversation[: 2 * number + 1]], [member])
                assert turn.text == answer.texts[0] == one.conversation[2 * number + 1]["content"]
                total += agents.worth(turn.text)
            assert reward == total
        assert played.scores.metrics["accuracy"].shape == (3,)
    assert both[0].scores.rewards.tolist() != both[1].scores.rewards.tolist()


def test_conversations_that_do_not_go_on_are_told_one_after_another(build):
    made = build("apart", [{}])
    (one,) = play(made).episodes
    assert [m["role"] for m in one.conversation] == ["user", "assistant"] * 2
    assert one.conversation[0]["content"] == str(one.start.seed % 10)
    assert one.reward == agents.worth("".join(turn.text for turn in one.turns))


def test_what_was_thought_and_not_told_an_agent_does_not_make_it_another_conversation():
    heard = Heard()
    heard.ask({"messages": ASKED})
    said = {"role": "assistant", "content": "b"}
    heard.messages.append({**said, "reasoning_content": "Hm."})
    heard.ask({"messages": [*ASKED, said, *ASKED]})
    assert [one["role"] for one in heard.messages] == ["user", "assistant", "user"]


DEEP = "[" * 500 + "]" * 500
DEEPER = "[" * 10**5
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
PLACE = "/v1/chat/completions"
KEY = {"Authorization": "Bearer " + 32 * "0"}
REFUSED = [
    (401, "the API key", ("POST", PLACE, KEY, body())),
    (401, "the API key", ("POST", PLACE, {"Authorization": "Bearer é"}, body())),
    (401, "the API key", ("GET", "/v1/models", KEY, None)),
    (404, "there are", ("POST", "/v1/completions", {}, body())),
    (404, "there are", ("GET", "/", {}, None)),
    (501, "Unsupported method", ("DELETE", PLACE, {}, None)),
    (413, "up to 1,048,576 bytes", ("POST", PLACE, {}, body(user="x" * 2**21))),
    (411, "Content-Length", ("POST", PLACE, {"Content-Length": "-1"}, "")),
    *(
        (400, said, ("POST", PLACE, {}, given))
        for said, given in [
            ("no JSON", "no"),
            ("no JSON", "\xff\xfe"),
            ("no JSON", DEEPER),
            ("no JSON", '{"messages": NaN}'),
            ("nested more than", body(tools=json.loads(DEEP))),
            ("has to be an object", "[]"),
            ("`messages` is missing", "{}"),
            ("`messages` has to be a list", '{"messages": "a"}'),
            ("a message needs a `role`", body(messages=[3])),
            ("a message needs a `role`", body(messages=[{"role": ["user"], "content": "a"}])),
            ("`content` has to be", body(messages=[{"role": "user", "content": [{"type": "image_url"}]}])),
            ("has to be text", body(messages=[{"role": "user", "content": None}])),
            ("allowed are 100,000", body(messages=[{"role": "user", "content": "x" * 100_001}])),
            ("as JSON in a text", body(messages=[{"role": "assistant", "tool_calls": [
                {"function": {"name": "f", "arguments": "[]"}}]}])),
            ("has to be a `function`", body(tools=["f"])),
            ("together with `tools`", body(tools=[TOOL], stop="x")),
            ("`stop` has to be", body(stop=3)),
            ("`max_tokens` has to be", body(max_tokens=True)),
            ("`stream` is not served", body(stream=True)),
            ("`n` is not served", body(n=2)),
            ("`tool_choice` is not served", body(tool_choice="required")),
            ("`parallel_tool_calls` is not served", body(parallel_tool_calls=False)),
            ("`frequency_penalty` is not served", body(frequency_penalty=0.5)),
            ("`presence_penalty` is not served", body(presence_penalty=-1)),
            ("the last of `messages` is the assistant's",
             body(messages=[*ASKED, {"role": "assistant", "content": "So"}])),
            ("`response_format` is not served", body(response_format={"type": "json_object"})),
        ]
    ),
]  # fmt: skip
SERVED = [
    body(max_tokens=2, model="gpt-4o"),
    body(stop=["lo", "l"], stream=False, n=1, user="me"),
    body(messages=[{"role": "developer", "content": [{"type": "text", "text": "\ud800b"}]}, *ASKED]),
    body(tools=[TOOL], parallel_tool_calls=True, presence_penalty=0),
    body(messages=[*ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                   {"role": "tool", "tool_call_id": "c", "content": "2"}], tools=[TOOL]),
]  # fmt: skip


def test_requests_are_served_or_refused_as_openai_says_it(build, tmp_path):
    """All by one agent, within its limits; the model's answers are given here."""
    models = ("GET", "/v1/models", {}, None)
    requests = [*(one for _, _, one in REFUSED), models, *(("POST", PLACE, {}, one) for one in SERVED)]
    to = tmp_path / "told.json"
    made = build("tries", [{"requests": requests, "to": str(to)}])
    called = 'So <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    engine = Noted(made.engine, "hello", "hello", "b", called, "<tool_call>f")
    engine.max_new_tokens = 4
    (one,) = play(made, engine).episodes
    assert (one.ended, one.reward, one.error) == ("done", 1.0, "")
    told = json.loads(to.read_text())
    for (status, said, request), (code, answer) in zip(REFUSED, told):
        assert (code, said in answer["error"]["message"]) == (status, True), (request, answer)
    (code, found), *answers = told[len(REFUSED) :]
    assert code == 200 and [one["id"] for one in found["data"]] == ["mpies"]
    assert {code for code, _ in answers} == {200}
    choices = [answer["choices"][0] for _, answer in answers]
    ends = [choice["finish_reason"] for choice in choices]
    assert ends == ["length", "stop", "stop", "tool_calls", "stop"]
    texts = [choice["message"]["content"] for choice in choices]
    assert texts[:3] == ["he", "he", "b"] and texts[4] == "<tool_call>f"
    (call,) = choices[3]["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "f", "arguments": '{"a": 1}'})
    first = answers[0][1]
    prompt = len(made.engine.text.encode(ASKED))
    assert first["usage"] == {"prompt_tokens": prompt, "completion_tokens": 2, "total_tokens": prompt + 2}
    assert (first["model"], first["object"]) == ("gpt-4o", "chat.completion")
    assert engine.prompts[2][0] == {"role": "system", "content": "?b"}
    assert engine.prompts[4][2] == {"role": "tool", "content": "2", "name": "f"}
    assert engine.prompts[4].tools[0]["function"]["name"] == "f"
    assert (sum(r.calls for r in one.replies), sum(r.bad_calls for r in one.replies)) == (2, 1)


def test_its_port_is_on_the_loopback_address_only(build):
    assert play(build("reached", [{}])).scores.rewards.tolist() == [1.0]


def test_a_place_is_given_back_after_its_request_and_the_port_after_its_episode(build):
    made = build("frugal", [{}])
    (one,) = play(made).episodes
    assert (one.error, one.reward, one.metrics["without"]) == ("", 40, 40)
    port, deadline = int(one.metrics["port"]), time.monotonic() + 10
    while is_open(port) and time.monotonic() < deadline:  # its process is ended while the rank goes on
        time.sleep(0.01)
    assert not is_open(port)


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != errno.ECONNREFUSED


# What an agent does -> what is said of it.
WRONG = {
    "none": "run's value is None; needed is a reward",
    "text": "run's value is '1.0' (str); needed is a number",
    "nan": "run's value is nan (float); needed is a number",
    "no_reward": "run returned {'accuracy': 1.0} (dict); needed is a reward",
    "raise": "run raised IndexError: list index out of range (",
    "leave": "run raised SystemExit: 3 (",
    "exit": "run ended its process with exit status 3",
    "impatient": "run has not waited for an answer; requests need to have no time-out",
}


def test_an_agent_that_fails_costs_its_own_episode(build):
    made = build("wicked", [{"what": what} for what in ("nothing", *WRONG)], task__failure_reward=-2.5)
    children = set(psutil.Process().children(recursive=True))
    played = play(made)
    assert played.scores.rewards.tolist() == [1.0] + [-2.5] * len(WRONG)
    assert played.scores.metrics["failed"].tolist() == [0.0] + [1.0] * len(WRONG)
    for said, one in zip(WRONG.values(), played.episodes[1:], strict=True):
        assert one.error.startswith(said)
    left = set(psutil.Process().children(recursive=True)) - children
    assert psutil.wait_procs(left, 10)[1] == []


@pytest.mark.parametrize(
    "what, limits, said",
    [
        ("spin", Limits(1, 300.0), "run took more than 1 s of CPU time"),
        ("sleep", Limits(1, 5.0), "run has not returned after 5 s"),
    ],
)
def test_an_agent_has_its_cpu_time_and_ends_with_all_that_it_has_started(what, limits, said):
    nursery = Nursery(Beginning(limits, agent=f"{FILE}:wicked"))
    family = psutil.Process(nursery._process.process.pid)
    row = {"what": what, "at_once": True}
    assert nursery.call([Call(0, "run", {"row": row, "seed": 0})]) == [{"error": said}]
    assert family.children(recursive=True) == []
    nursery.close()


def test_agents_that_crowd_or_ask_what_cannot_be_written_are_bounded(build):
    made = build("wicked", [{"what": what} for what in ("nothing", "crowd", "wrong")], task__max_turns=40)
    made.engine.text.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    fine, crowd, wrong = play(made).episodes
    assert (fine.reward, crowd.reward) == (1.0, 1.0) and 1 < len(crowd.turns) <= 40
    assert wrong.error.startswith("run has asked what cannot be told the model: task.chat_template: ")
    assert len(wrong.turns) == 1


@pytest.mark.parametrize("limit", [{"task__max_turns": 2}, {"task__episode_tokens": 60}])
def test_over_a_limit_requests_are_refused_and_what_is_returned_counts(build, limit):
    rows = [{"asks": "a" * 9, "gives_up": gives_up} for gives_up in (False, True)]
    made = build("beyond", rows, **limit, task__failure_reward=-1)
    played = play(made)
    cut, failed = played.episodes
    count = len(cut.turns)
    assert (cut.ended, failed.ended, played.scores.rewards.tolist()) == (
        "turns" if "task__max_turns" in limit else "tokens", "failed", [count, -1]
    )  # fmt: skip
    assert 2 <= count < 5 and played.scores.metrics["refused"][0] == 1
    assert failed.error.startswith("run raised HTTPError: HTTP Error 400")


def test_one_that_never_asks_has_its_reward_unless_none_does(build):
    rows = [{"what": "nothing"}, {"what": "nothing", "at_once": True, "prompt": "p"}]
    played = play(build("wicked", rows))
    assert [len(one.turns) for one in played.episodes] == [1, 0]
    assert played.scores.rewards.tolist() == [1.0, 1.0]
    with pytest.raises(
        InputError, match=r"^task\.agent: row 1: its episode ended before the model was asked"
    ):
        build("wicked", rows[1:])


@pytest.mark.parametrize(
    "code, said",
    [
        ("def runs(): ...", "has no function 'run'; did you mean {file}:runs?"),
        ("def run(row, base_url): ...", "row 1: run raised TypeError: run() takes 2 positional arguments"),
        ("import sys; sys.exit(1)", "cannot be imported: SystemExit: 1 ({file} line 1)"),
        (
            f"import sys, time\nsys.path.append({HELPERS!r})\nimport agents\n"
            "def run(row, *more): return agents.ask(*more, str(time.time()))",
            "the episode of row 1 began otherwise the second time, with the same seed",
        ),
    ],
)
def test_what_is_no_agent_is_refused(tmp_path, code, said):
    file = tmp_path / "agent.py"
    file.write_text(code)
    with pytest.raises(InputError) as error:
        making.make(config.TaskSettings(agent=f"{file}:run", train_size=1))
    assert str(error.value).startswith("task.agent: ") and "\n" not in str(error.value)
    assert said.format(file=file) in str(error.value)


def test_a_run_with_an_agent_tells_what_its_episodes_came_to(runs):
    own = {"task__agent": f"{FILE}:run", "task__train_size": 2, "task__eval_size": 1}
    assert runs.train(2, **(OWN | own), run__evaluate_every=1) == 0
    with h5py.File(runs.folder / "run.h5") as file:
        assert (file["member/turns"][:2] == 4).all() and not file["member/failed"][:2].any()
        assert list(json.loads(file["start/rewards"].asstr()[0])) == [f"{FILE}:run"]
        told = json.loads(file["sample/messages"].asstr()[0])
        assert [m["role"] for m in told["conversation"]] == ["user", "assistant"] * 2
        assert told["ended"] == "done after 2 turns"
