"""The reference of docs/results.md: TRL's GRPO on the same model, prompts and reward, for 640 answers.

python docs/results/grpo.py MODEL OUTPUT SEED [LEARNING_RATE]      # needs: pip install trl
python -m mpies.evaluate OUTPUT                                    # then, as any model
"""

import sys
import time

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from mpies.tasks import conciseness

ANSWERS, GROUP = 640, 8


def main(model: str, output: str, seed: str, learning_rate: str = "1e-5") -> None:
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "answer": answer}
        for prompt, answer in conciseness.TRAIN.items()
    ]
    settings = GRPOConfig(
        output_dir=output,
        seed=int(seed),
        learning_rate=float(learning_rate),
        max_steps=ANSWERS // GROUP,
        num_generations=GROUP,
        per_device_train_batch_size=GROUP,
        max_completion_length=40,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=10,
    )
    trainer = GRPOTrainer(
        model=model, reward_funcs=conciseness.reward, args=settings, train_dataset=Dataset.from_list(rows)
    )
    start = time.perf_counter()
    trainer.train()
    print(f"{time.perf_counter() - start:.0f} s")
    trainer.save_model(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
