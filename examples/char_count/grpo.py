"""GRPO by TRL from the same start, on the same rows, with the same reward: answers and core-seconds.

    python examples/char_count/grpo.py START OUTPUT [--answers 28800] [--learning-rate 1e-6]

Needs `pip install trl`. TRL's defaults hold but for what the recipe says (8 answers to a prompt at
temperature 1, learning rate 1e-6, no KL term); a step takes 256 answers instead of 1,024, so that as many
answers make more steps. Every few steps, a folder OUTPUT/checkpoint-STEP is kept: a model to evaluate, and
what the same command goes on from. OUTPUT/cost.jsonl has a line a step: answers and core-seconds so far, and
the step's mean reward.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from rewards import right
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from mpies.model.loading import choose_dtype

HERE = Path(__file__).parent
PROMPTS, ANSWERS = 32, 8  # of a step, and of a prompt
AT_ONCE = 64  # answers in one forward and backward pass


class Cost(TrainerCallback):
    """Appends a line to cost.jsonl after every step. Core-seconds are this process's, without its start."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.before = json.loads(lines[-1])["core_seconds"] if lines else 0.0
        self.began = time.process_time()

    def on_log(self, arguments, state, control, logs=None, **others):
        if "reward" not in (logs or {}):
            return
        line = {
            "step": state.global_step,
            "answers": state.global_step * PROMPTS * ANSWERS,
            "core_seconds": round(self.before + time.process_time() - self.began, 1),
            "reward": logs["reward"],
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("start", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--answers", type=int, default=28_800)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--keep-every", type=int, default=16, help="steps between kept folders")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    fast_bfloat16 = choose_dtype("auto", torch.device("cpu"))[0] == torch.bfloat16
    rows = [json.loads(line) for line in (HERE / "train.jsonl").read_text().splitlines()]
    options.output.mkdir(parents=True, exist_ok=True)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.start, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(options.start),
        reward_funcs=right,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]),
        args=GRPOConfig(
            output_dir=str(options.output),
            max_steps=options.answers // (PROMPTS * ANSWERS),
            per_device_train_batch_size=AT_ONCE,
            gradient_accumulation_steps=PROMPTS * ANSWERS // AT_ONCE,
            num_generations=ANSWERS,
            max_completion_length=96,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=fast_bfloat16,
            logging_steps=1,
            save_steps=options.keep_every,
            seed=options.seed,
            report_to="none",
        ),
        callbacks=[Cost(options.output / "cost.jsonl")],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(options.output)))
    trainer.save_model(str(options.output / "final"))


if __name__ == "__main__":
    main()
