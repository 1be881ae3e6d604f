"""The Hugging Face engine: greedy, whatever the batch, the padding and the model folder's own wishes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpies.engines.hf import HfEngine
from mpies.engines.text import Text
from mpies.errors import InputError
from mpies.model import loading, saving
from mpies.model.weights import take_over
from mpies.noise.cpu import CpuKernels

EOS = 2
pytestmark = pytest.mark.usefixtures("one_thread")

NEW = 8
# Of very different lengths, so that most rows of a batch are padded.
PROMPTS = [
    "Solve: 3 + 5 =",
    "a",
    "Name one primary color:",
    "What comes next in the sequence: 2, 4, 6, 8, ?",
    "zz",
]
KINDS = pytest.mark.parametrize("kind", ["llama", "qwen2"])


@pytest.fixture
def load(tiny_model, tmp_path):
    """load(generation_config={...}, kind=...) -> (model, tokenizer), as the program loads them."""

    def make(generation_config=None, **options):
        folder = tiny_model(**options)
        if generation_config:
            folder = shutil.copytree(folder, tmp_path / "model")
            (folder / "generation_config.json").write_text(json.dumps(generation_config))
        return loading.load(str(folder), allow_download=False)

    return make


def engine_of(model, tokenizer, **options) -> HfEngine:
    text = Text(model, tokenizer, options.pop("chat_template", False))
    return HfEngine(model, text, **{"max_new_tokens": NEW, "batch_size": 32, **options})


@torch.inference_mode()
def argmax_loop(model, ids: list[int], stops=(EOS,), new: int = NEW) -> list[int]:
    """Greedy decoding as it is defined: one prompt, no padding, no cache."""
    ids = list(ids)
    start = len(ids)
    for _ in range(new):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[start:]


def answers(model, tokenizer, prompts: list[str] = PROMPTS, **options) -> list[list[int]]:
    return [argmax_loop(model, tokenizer(prompt)["input_ids"], **options) for prompt in prompts]


def text_of(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def assert_answers(engine: HfEngine, expected: list[list[int]], prompts: list[str] = PROMPTS) -> None:
    made = engine.generate(prompts)
    assert made.tokens == [len(tokens) for tokens in expected]
    assert made.texts == [text_of(engine.text.tokenizer, tokens) for tokens in expected]


# Greedy


@KINDS
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_answers_are_those_of_a_plain_argmax_loop(load, kind, tied):
    model, tokenizer = load(kind=kind, tied=tied)
    expected = answers(model, tokenizer)
    assert len({tuple(tokens) for tokens in expected}) > 2, "the prompts make a difference"
    assert_answers(engine_of(model, tokenizer), expected)


@KINDS
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_batch_size_only_splits(load, kind, batch_size):
    model, tokenizer = load(kind=kind)
    assert_answers(engine_of(model, tokenizer, batch_size=batch_size), answers(model, tokenizer))


def test_order_and_repetition_of_prompts(load):
    model, tokenizer = load()
    engine = engine_of(model, tokenizer, batch_size=2)
    once = dict(zip(PROMPTS, engine.generate(PROMPTS).texts, strict=True))
    shuffled = [PROMPTS[i] for i in (4, 0, 0, 3, 1, 2, 4)]
    assert engine.generate(shuffled).texts == [once[prompt] for prompt in shuffled]


def test_no_prompts(load):
    made = engine_of(*load()).generate([])
    assert (made.texts, made.tokens) == ([], [])


@pytest.mark.parametrize("new", [1, 2, 30])
def test_max_new_tokens(load, new):
    model, tokenizer = load()
    expected = answers(model, tokenizer, new=new)
    assert max(map(len, expected)) == new
    assert_answers(engine_of(model, tokenizer, max_new_tokens=new), expected)


def test_the_same_twice(load):
    engine = engine_of(*load(kind="qwen2", dtype=torch.bfloat16))
    assert engine.generate(PROMPTS) == engine.generate(PROMPTS)


def test_a_window_that_the_model_does_not_have(load):
    """A Llama's config.json may tell of a Mistral's; the cache must not forget what a Llama reads."""
    model, tokenizer = load()
    model.config.sliding_window = 8
    assert max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS) > 2 * 8
    assert_answers(engine_of(model, tokenizer), answers(model, tokenizer))


# The end of a sequence


def with_stop(model, tokenizer) -> int:
    """A token that the model says third or later in some answers, but not in all."""
    said = answers(model, tokenizer)
    for token in {token for tokens in said for token in tokens[2:]}:
        places = [tokens.index(token) if token in tokens else None for tokens in said]
        if None in places and max(place for place in places if place is not None) >= 2:
            return token
    raise AssertionError("all answers have the same tokens: choose other prompts or another model")


@KINDS
@pytest.mark.parametrize("as_list", [False, True])
def test_stops_at_the_end_of_sequence_of_the_generation_config(load, kind, as_list):
    stop = with_stop(*load(kind=kind))
    eos = [EOS, stop] if as_list else stop
    model, tokenizer = load({"eos_token_id": eos}, kind=kind)
    expected = answers(model, tokenizer, stops=(EOS, stop))
    assert {tokens[-1] == stop for tokens in expected} == {True, False}, "some end early, some do not"
    # The end of sequence is a token that was generated, and counts.
    assert_answers(engine_of(model, tokenizer), expected)


def test_stops_at_the_end_of_sequence_of_the_tokenizer(load):
    """Chat models end a turn with a token that may stand in the tokenizer's settings alone."""
    model, tokenizer = load()
    stop = with_stop(model, tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    assert_answers(engine_of(model, tokenizer), answers(model, tokenizer, stops=(EOS, stop)))


def test_stops_at_the_end_of_sequence_of_the_model_config(load):
    model, tokenizer = load()
    stop = with_stop(model, tokenizer)
    model.config.eos_token_id = [stop]
    assert_answers(engine_of(model, tokenizer), answers(model, tokenizer, stops=(EOS, stop)))


def test_text_after_the_end_and_special_tokens_are_not_shown(load):
    model, tokenizer = load(tied=False)
    # Whatever the weights: "a", the end of sequence, and more letters for those who do not stop.
    letter = tokenizer.convert_tokens_to_ids("a")
    told = iter([letter, EOS, letter, letter, letter, letter])

    def say_next(module, inputs, output):
        logits = torch.zeros_like(output)
        logits[..., next(told)] = 1
        return logits

    model.lm_head.register_forward_hook(say_next)
    made = engine_of(model, tokenizer).generate(["one", "three"])
    assert (made.texts, made.tokens) == (["a", "a"], [2, 2])


# The model folder's own wishes


@pytest.mark.parametrize(
    "wish",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.5},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3, "length_penalty": 2.0},
        {"max_new_tokens": 2},
        {"max_length": 10},
        {"min_new_tokens": 12},
        {"suppress_tokens": list(range(4, 60))},
        {"bad_words_ids": [[t] for t in range(4, 60)]},
        {"forced_eos_token_id": 7},
        {"begin_suppress_tokens": list(range(4, 99))},
    ],
    ids=lambda wish: next(iter(wish)),
)
def test_the_folders_decoding_settings_are_ignored(load, wish):
    stop = with_stop(*load())
    model, tokenizer = load({"eos_token_id": [EOS, stop], **wish})
    assert_answers(engine_of(model, tokenizer), answers(model, tokenizer, stops=(EOS, stop)))


def test_the_folders_decoding_settings_are_saved_again(load, tmp_path):
    """The tuned model is used like the one that it was made from; above all, it stops."""
    wish = {"eos_token_id": [EOS, 7, 9], "temperature": 0.6, "do_sample": True, "pad_token_id": 0}
    model, tokenizer = load(wish)
    engine_of(model, tokenizer).generate(["a"])
    saving.save(model, tokenizer, tmp_path / "saved", {})
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert {key: getattr(saved, key) for key in wish} == wish


# Chat templates


def test_chat_template_is_applied(load):
    model, tokenizer = load()
    ids = tokenizer("<bos>user: Solve: 3 + 5 =<eos><bos>assistant: ")["input_ids"]
    expected = argmax_loop(model, ids)
    assert expected != argmax_loop(model, tokenizer("Solve: 3 + 5 =")["input_ids"])
    assert_answers(engine_of(model, tokenizer, chat_template=True), [expected], ["Solve: 3 + 5 ="])


@pytest.mark.parametrize("chat_template", [False, True])
def test_messages_are_always_a_chat(load, chat_template):
    model, tokenizer = load()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = tokenizer("<bos>system: Be brief.<eos><bos>user: Hi<eos><bos>assistant: ")["input_ids"]
    engine = engine_of(model, tokenizer, chat_template=chat_template)
    assert_answers(engine, [argmax_loop(model, ids)], [messages])


def test_chat_templates_special_tokens_are_not_doubled(load):
    """A tokenizer that puts <bos> in front must not do so again where the template has."""
    model, tokenizer = load()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    ids = tokenizer("<bos>user: a<eos><bos>assistant: ", add_special_tokens=False)["input_ids"]
    assert_answers(engine_of(model, tokenizer, chat_template=True), [argmax_loop(model, ids)], ["a"])
    plain = argmax_loop(model, tokenizer("a")["input_ids"])
    assert_answers(engine_of(model, tokenizer), [plain], ["a"])


def test_missing_chat_template_is_refused(load):
    model, tokenizer = load()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"task\.chat_template: .*task\.chat_template=false") as error:
        engine_of(model, tokenizer, chat_template=True)
    assert len(str(error.value).splitlines()) == 1
    engine_of(model, tokenizer, chat_template=False).generate(["a"])


# The live weights


@KINDS
def test_follows_the_live_weights(load, kind):
    model, tokenizer = load(kind=kind)
    weights = take_over(model, torch.float32, torch.device("cpu"), CpuKernels(1))
    engine = engine_of(model, tokenizer)
    first = engine.generate(PROMPTS)
    for seed in (1, 2, 3):
        weights.perturb(seed, 0.1)
        assert_answers(engine, answers(model, tokenizer))
        assert engine.generate(PROMPTS) != first
    weights.show_base()
    assert engine.generate(PROMPTS) == first


def test_a_tokenizer_without_padding_token(load):
    model, tokenizer = load()
    expected = answers(model, tokenizer)
    tokenizer.pad_token = None
    assert_answers(engine_of(model, tokenizer), expected)


@pytest.mark.parametrize(
    "rope, positions",
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 512),
    ],
)
def test_positions_that_a_model_knows(load, rope, positions):
    model, tokenizer = load()
    model.config.rope_parameters = {"rope_theta": 10000.0, **rope}
    assert Text(model, tokenizer, False).positions == positions
