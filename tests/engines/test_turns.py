"""What is kept of a conversation from turn to turn: the answers of reading it anew, and fewer tokens read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import zoo

from mpies.engines.base import Conversations
from mpies.engines.hf import HfEngine
from mpies.engines.text import Text
from mpies.es.population import Member
from mpies.model.lowrank import LowRank
from mpies.model.weights import Weights

pytestmark = pytest.mark.usefixtures("one_thread")

OPENINGS = ["Solve: 3 + 5 =", "a?", "Name one primary color:", "zz, and no more of it"]
TURNS = [3, 4, 2, 4]  # of each conversation
NOISE = [Member(0, 5, 1), Member(1, 9, -1)]


@pytest.fixture(scope="module")
def started():
    """started("full" | "lowrank") -> a Llama past the test at the start; its rows end one after another."""
    made = {}
    for name in ("full", "lowrank"):
        made[name] = zoo.start(zoo.build("llama"), name == "lowrank")
        made[name].engine.text.stops = set(range(0, 99, 7))
    return made.__getitem__


def appended(text: str, answer: str, number: int, turn: int) -> str:
    return f"{text}{answer}{' so?' * (1 + (number + turn) % 3)}"


def without_answers(text: str, answer: str, number: int, turn: int) -> str:
    """As templates do that drop what was thought."""
    return f"{text} ... {turn}, and so on"


class Talk:
    """Conversations of each member, turn by turn, until all have ended; and what was read then."""

    def __init__(
        self,
        engine: HfEngine,
        members: int = 1,
        keeps: bool = True,
        write: Callable[[str, str, int, int], str] = appended,
        between: Callable[[int], Any] = lambda turn: None,
    ):
        self.engine, count = engine, len(OPENINGS)
        kept = engine.keep() if keeps else None
        texts, live = OPENINGS * members, list(range(count * members))
        self.shapes: list[tuple[int, ...]] = []
        self.first: list[int] = []  # of the shapes of each turn
        self.turns: list[tuple[list[int], list[list[int]], list[list[int]]]] = []
        hook = engine.model.register_forward_pre_hook(
            lambda _, given: self.shapes.append(tuple(given[0].shape))
        )
        try:
            for turn in range(max(TURNS)):
                between(turn)
                self.first.append(len(self.shapes))
                prompts = [texts[i] for i in live]
                which = Conversations(kept, live) if kept else None
                said = engine.generate_each(prompts, [i // count for i in live], which)
                self.turns.append((live, list(map(engine.text.encode, prompts)), said.ids))
                for i, text in zip(live, said.texts, strict=True):
                    texts[i] = write(texts[i], text, i, turn)
                live = [i for i in live if TURNS[i % count] > turn + 1]
        finally:
            hook.remove()

    @property
    def answers(self) -> list[list[list[int]]]:
        return [ids for *_, ids in self.turns]

    @property
    def read(self) -> int:
        """Tokens, padding included."""
        return sum(rows * tokens for rows, tokens in self.shapes)

    @property
    def begun(self) -> list[tuple[int, ...]]:
        """Of all that was read of prompts: rows, tokens."""
        return [shape for shape in self.shapes if shape[1] > 1]

    def expected(self, size: int) -> list[tuple[int, ...]]:
        """What is to be read of prompts in batches of so many, by the definition, of one member."""
        found, before = [], {}
        for live, prompts, ids in self.turns:
            same = {i: common(before[i], prompt) for i, prompt in zip(live, prompts) if i in before}
            long = dict(zip(live, map(len, prompts), strict=True))
            old = {i: tokens for i, tokens in same.items() if 2 * tokens >= long[i]}
            order = sorted(live, key=lambda i: (i not in old, long[i], i))
            for first in range(0, len(order), size):
                chosen = order[first : first + size]
                going_on = {i: old[i] for i in chosen if i in old and not first}
                anew = [i for i in chosen if i not in going_on]
                found += [(len(anew), max(long[i] for i in anew))] if anew else []
                found += [(len(going_on), max(long[i] - n for i, n in going_on.items()))] if going_on else []
                if not first:
                    answers = dict(zip(live, zip(prompts, ids, strict=True), strict=True))
                    before = {i: [*answers[i][0], *answers[i][1][:-1]] for i in chosen}
        return found


def common(before: list[int], prompt: list[int]) -> int:
    most = min(len(before), len(prompt) - 1)
    return next((i for i in range(most) if before[i] != prompt[i]), most)


@pytest.mark.parametrize("write", [appended, without_answers])
@pytest.mark.parametrize("size", [1, 2, 3, 32])
def test_the_same_answers_and_just_what_is_new_is_read(started, size, write):
    engine = started("full").engine
    engine.batch_size = size
    kept, anew = Talk(engine, write=write), Talk(engine, keeps=False, write=write)
    assert kept.answers == anew.answers
    assert kept.begun == kept.expected(size)
    assert kept.shapes[0] == anew.shapes[0] and kept.read < anew.read
    if size == 32 and write is appended:  # all is kept: a turn after the first is one piece, of a few tokens
        assert len(kept.begun) == len(TURNS) == 4
        assert sum(tokens for _, tokens in kept.begun[1:]) < 0.7 * sum(tokens for _, tokens in anew.begun[1:])
        steps = [[shape for shape in talk.shapes if shape[1] == 1] for talk in (kept, anew)]
        assert steps[0] == steps[1]


@pytest.mark.parametrize("size", [3, 32])
def test_rows_keep_their_members(started, size):
    made = started("lowrank")
    made.engine.batch_size = size
    made.perturbation.set(NOISE, 0.3)
    kept, anew = Talk(made.engine, 2), Talk(made.engine, 2, keeps=False)
    assert kept.answers == anew.answers and kept.read < anew.read
    count = len(OPENINGS)
    assert kept.answers[0][:count] != kept.answers[0][count:]
    # The same conversation of another member is another.
    recalled = made.engine.keep()
    prompts = [OPENINGS[2]]
    (first,) = made.engine.generate_each(prompts, [0], Conversations(recalled, [0])).texts
    asked = [appended(prompts[0], first, 0, 0)]
    assert recalled.recall([(1, 0)], [made.engine.text.encode(asked[0])]) == [None]
    made.perturbation.clear()


@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3", "gpt2"])
def test_windows_latent_attention_and_learned_positions(name):
    engine = zoo.start(zoo.build(name), lowrank=False).engine
    assert engine.keeps
    kept, anew = Talk(engine), Talk(engine, keeps=False)
    assert kept.answers == anew.answers and kept.begun == kept.expected(9)


@pytest.mark.parametrize("name", ["lfm2", "mamba"])
def test_states_cannot_be_cut_back(name):
    model = zoo.build(name)
    text = Text(model, tiny.tokenizer(), chat_template=False)
    engine = HfEngine(model, text, max_new_tokens=4, batch_size=4, version=lambda: 0)
    assert not engine.keeps and engine.keep() is None


def lend(weights: Weights) -> None:
    with weights.lending({}):
        pass


# What the model computes may be another after each of these.
STEP = np.array([3], np.uint64), np.array([0.1], np.float32)
OF_WEIGHTS: dict[str, Callable[[Weights], Any]] = {
    "perturb": lambda weights: weights.perturb(7, 0.2),
    "show_base": lambda weights: weights.show_base(),
    "show": lambda weights: weights.show([(name, 1.1 * base) for name, base in weights.base.items()]),
    "lending": lend,
    "restore": lambda weights: weights.restore(*next(iter(weights.base.items()))),
    "update": lambda weights: weights.update(*STEP),
    "update_one": lambda weights: weights.update_one(next(iter(weights.base)), *STEP),
    "perturb_each": lambda weights: weights.perturb_each(4, {"lm_head.weight": 0.3}),
    "show_updated": lambda weights: weights.show_updated(*STEP),
    "changed": lambda weights: weights.changed(),
    "leave_out": lambda weights: weights.leave_out(["lm_head"]),  # shows the base
}
READS = {"value", "as_base", "updated", "find_unfit", "digest", "whole_digest", "digest_of"}
OF_LOWRANK: dict[str, Callable[[LowRank], Any]] = {
    "set": lambda lowrank: lowrank.set(NOISE[::-1], 0.3),
    "set_each": lambda lowrank: lowrank.set_each(NOISE, dict.fromkeys(lowrank.weights.base, 0.2)),
    "clear": lambda lowrank: lowrank.clear(),
    "rest": lambda lowrank: lowrank.rest(),
}


def methods(of: type) -> set[str]:
    return {name for name, value in vars(of).items() if callable(value) and not name.startswith("_")}


def test_all_that_changes_what_is_computed_is_known():
    assert methods(Weights) == set(OF_WEIGHTS) | READS
    assert methods(LowRank) == set(OF_LOWRANK) | {"rows"}


@pytest.mark.parametrize("name", [*OF_WEIGHTS, *OF_LOWRANK])
def test_what_was_kept_is_of_no_use_once_the_model_is_another(name):
    lowrank = name in OF_LOWRANK
    read = []
    for keeps in (True, False):
        made = zoo.start(zoo.build("llama", tie_word_embeddings=False), lowrank)

        def change(turn: int, made: zoo.Started = made) -> None:
            if turn == 0 and lowrank:
                made.perturbation.set(NOISE, 0.3)
            elif turn == 0:
                made.weights.perturb(2, 0.2)
            elif turn == 2 and lowrank:
                OF_LOWRANK[name](made.perturbation)
            elif turn == 2:
                OF_WEIGHTS[name](made.weights)

        read.append(Talk(made.engine, keeps=keeps, between=change))
    kept, anew = read
    assert kept.answers == anew.answers
    goes_on = [kept.shapes[i] != anew.shapes[j] for i, j in zip(kept.first, anew.first, strict=True)]
    assert goes_on == [False, True, False, True]
