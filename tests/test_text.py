"""How numbers, sizes and durations read, and what JSON can hold."""

from __future__ import annotations

import json
import math

import pytest

from mpies.text import clip, count, duration, json_ready, size


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0, "0 s"),
        (0.0021, "2.1 ms"),
        (0.0994, "99 ms"),
        (0.0996, "0.1 s"),
        (3.44, "3.4 s"),
        (9.96, "10 s"),
        (75, "75 s"),
        (119.6, "120 s"),
        (130, "2.17 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (86400, "24 h"),
        (12.5 * 86400, "12.5 days"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_sizes():
    assert [size(n) for n in (12, 1234, 5.6e6, 30.46e9)] == ["12 B", "1.23 kB", "5.6 MB", "30.5 GB"]


def test_numbers_of_parameters():
    assert [count(n) for n in (12_345, 134_515_008, 7_615_616_512)] == ["12345", "134.5 M", "7.616 B"]


def test_a_text_on_a_line():
    assert clip("two\nlines\x1b[2J  and\tmore") == "two lines [2J and more"
    assert clip("x" * 20, 10) == "xxxxxxx..."


def test_what_json_does_not_know_is_null():
    given = {"a": math.nan, "b": [1.5, -math.inf, "nan"], "c": {"d": (math.inf, 2, None, True)}}
    ready = json_ready(given)
    assert ready == {"a": None, "b": [1.5, None, "nan"], "c": {"d": [None, 2, None, True]}}
    json.dumps(ready, allow_nan=False)
