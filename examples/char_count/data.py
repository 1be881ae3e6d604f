"""char_count: how often is a letter in a word that is spelled out? 9,000 rows to train on, 1,000 held out.

    python examples/char_count/data.py              # writes train.jsonl and held-out.jsonl beside this file

The task is that of verl's recipe `char_count` (verl-project/verl-recipe): random words of 5 to 20 letters,
and a letter that is in them at least once; length and count are uniform. A row is the question as a chat, the
count, and the worked solution that sft.py learns from.
"""

import json
import string
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
LENGTHS = 5, 20
ROWS = {"train": 9000, "held-out": 1000}
SEED = 1


def make_row(random: Random) -> dict:
    length = random.randint(*LENGTHS)
    count = random.randint(1, length)
    letter = random.choice(string.ascii_lowercase)
    others = string.ascii_lowercase.replace(letter, "")
    word = [letter] * count + [random.choice(others) for _ in range(length - count)]
    random.shuffle(word)
    question = f"How many {letter} are there in word {'-'.join(word)}?"
    return {
        "prompt": [{"role": "user", "content": question}],
        "answer": count,
        "solution": solve(letter, word),
    }


def solve(letter: str, word: list[str]) -> str:
    """The working: a line for each letter of the word, equal or not, and the count in a box."""
    lines = [f"{other} {'=' if other == letter else '!='} {letter}" for other in word]
    return "\n".join([*lines, rf"\boxed{{{word.count(letter)}}}"])


def main() -> None:
    random, seen = Random(SEED), set()
    for name, wanted in ROWS.items():
        rows = []
        while len(rows) < wanted:
            row = make_row(random)
            question = row["prompt"][0]["content"]
            if question not in seen:  # so that no held-out question is among the trained ones
                seen.add(question)
                rows.append(row)
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
