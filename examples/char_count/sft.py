"""The start of char_count: one epoch of supervised fine-tuning on worked answers, in plain torch.

    python examples/char_count/sft.py MODEL OUTPUT [--steps 72] [--seed 1]

As in verl's recipe: batches of 64 rows, AdamW with betas 0.9 and 0.95 and weight decay 0.1, gradients clipped
at 1, a cosine down to a tenth of the learning rate. That is larger and there are fewer steps, for two cores.
Weights are float32; products are bfloat16 on processors that are fast at it. OUTPUT is written at the end;
every ten steps, a file beside it from which the same command goes on.
"""

import argparse
import json
import math
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpies.model.folder import locate
from mpies.model.loading import choose_dtype

HERE = Path(__file__).parent
PARTS = 4  # of a batch, one after another, for memory
FLOOR, WARM_UP = 0.1, 0.05


def encode(tokenizer, row: dict) -> tuple[list[int], int]:
    """Tokens of a question and its solution, and how many of them are the question's."""
    question = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    end = tokenizer.eos_token
    return question + tokenizer(row["solution"] + end, add_special_tokens=False).input_ids, len(question)


def sum_losses(model, examples: list[tuple[list[int], int]]) -> torch.Tensor:
    """Minus the log-probability of all tokens of the solutions. Only they are projected to the vocabulary."""
    width = max(len(tokens) for tokens, _ in examples)
    inputs = torch.zeros((len(examples), width), dtype=torch.long)
    mask, answers = torch.zeros_like(inputs), torch.zeros_like(inputs, dtype=torch.bool)
    for i, (tokens, question) in enumerate(examples):
        inputs[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        answers[i, question : len(tokens)] = True
    hidden = model.model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][answers[:, 1:]])
    return torch.nn.functional.cross_entropy(logits.float(), inputs[answers], reduction="sum")


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2)


def make_step(model, optimizer, batch: list[tuple[list[int], int]], autocast: bool) -> float:
    """A step over a batch, in parts of similar length; returns the mean loss of a solution's token."""
    batch = sorted(batch, key=lambda example: len(example[0]))
    counted = sum(len(tokens) - question for tokens, question in batch)
    total, size = 0.0, math.ceil(len(batch) / PARTS)
    for first in range(0, len(batch), size):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = sum_losses(model, batch[first : first + size]) / counted
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, or quickstart: the embedded model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(locate(options.model))
    model = AutoModelForCausalLM.from_pretrained(
        locate(options.model), dtype=torch.float32, attn_implementation="eager"
    )
    model.train()
    rows = [json.loads(line) for line in (HERE / "train.jsonl").read_text().splitlines()]
    Random(options.seed).shuffle(rows)
    examples = [encode(tokenizer, row) for row in rows[: options.batch * options.steps]]
    autocast = choose_dtype("auto", torch.device("cpu"))[0] == torch.bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)

    state, first = options.output.with_suffix(".state.pt"), 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["steps"]
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.learning_rate)
        batch = examples[options.batch * step : options.batch * (step + 1)]
        loss = make_step(model, optimizer, batch, autocast)
        print(f"step {step + 1} of {options.steps}: loss {loss:.4f}", flush=True)
        if (step + 1) % 10 == 0:
            state.parent.mkdir(parents=True, exist_ok=True)
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "steps": step + 1}, state
            )
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
