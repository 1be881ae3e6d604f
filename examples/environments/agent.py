"""An agent that knows nothing of mpies: it asks a model, checks the answer, and asks again.

mpirun -n 2 python -m mpies.train examples/environments/agent.yaml
"""

import json
import urllib.request

from calculator import is_right, value_of

TRIES = 3
TOOL = " You may compute with the calculator."  # which it has not


def run(row, base_url, api_key):
    """1 if the problem is solved at once, less for each try more, 0 if it is not."""
    (asked,) = row["prompt"]
    messages = [{**asked, "content": asked["content"].replace(TOOL, "")}]
    for number in range(TRIES):
        answer = ask(base_url, api_key, messages)
        if is_right(answer, row["target"], row["nums"]):
            return {"reward": 1 - number / TRIES, "accuracy": 1, "tries": number + 1}
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": f"{problem_of(answer)} Try again."},
        ]
    return {"reward": 0, "accuracy": 0, "tries": TRIES}


def ask(base_url: str, api_key: str, messages: list[dict]) -> str:
    """What the model says; a package such as openai does the same."""
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps({"model": "mpies", "messages": messages}).encode(),
        {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def problem_of(answer: str) -> str:
    """What is wrong with an answer that is not right."""
    _, found, rest = answer.rpartition("<answer>")
    if not found:
        return "There is no <answer>EXPRESSION</answer>."
    try:
        return f"That is {value_of(rest.partition('</answer>')[0])}, or not of the numbers given."
    except (ValueError, ZeroDivisionError):
        return "That is no expression with a value."
