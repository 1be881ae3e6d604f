"""Reward functions of one's own. They run in mpies and, unchanged, in TRL's GRPOTrainer.

    mpirun -n 2 python -m mpies.train model.path=quickstart task.train_data=examples/train.jsonl \\
        task.reward='{examples/rewards.py:right: 1, examples/rewards.py:brief: 0.2}'

A function gets the prompts, the completions and every column of the data by name, each a list with an
entry per completion, and returns a number for each, or None where it has no say. In TRL:

    GRPOTrainer(model, reward_funcs=[right, brief], args=GRPOConfig(reward_weights=[1, 0.2]),
                train_dataset=load_dataset("json", data_files="examples/train.jsonl", split="train"))
"""


def right(completions, answer, log_extra, **columns):
    """1 if the answer's first word is the right one."""
    words = [text(completion).split() for completion in completions]
    firsts = [word[0].strip(".,!:\"'").lower() if word else "" for word in words]
    hits = [float(first == known.lower()) for first, known in zip(firsts, answer)]
    log_extra("accuracy", hits)  # mpies shows it beside the reward; TRL, in its table of completions
    return hits


def brief(completions, **columns):
    """0 for a word, and less the longer the answer is."""
    return [-(max(0, len(text(completion).split()) - 1) ** 0.5) for completion in completions]


def text(completion):
    """A completion is text where prompts are text, and a list with a message where they are chats."""
    return completion if isinstance(completion, str) else completion[0]["content"]
