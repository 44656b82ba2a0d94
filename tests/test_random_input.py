"""Random bad input, the same in every run: none ends in a traceback, hangs or has a wrong exit code."""

import pytest
import random_input

SEED, CASES = 0, 60  # `python tests/random_input.py --minutes 20` tries more


@pytest.mark.slow(60)
def test_random_bad_input_is_one_line(tmp_path):
    (tmp_path / "inputs").mkdir()
    inputs, bad = random_input.Inputs(tmp_path / "inputs"), []
    for number in range(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        case = random_input.make(SEED, number, inputs, folder)
        if wrong := random_input.run(case, folder):
            bad.append(f"case {number}: {case.what}: {wrong}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "program, code, err, wrong",
    [
        ("eval.py", 2, "error: x\n", False),
        ("eval.py", 0, "", False),
        ("eval.py", 2, "error: x\ny\n", True),
        ("eval.py", 2, "", True),
        ("eval.py", 1, "error: x\n", True),
        ("eval.py", 0, "a warning\n", True),
        ("eval.py", 1, "Traceback (most recent call last):\n", True),
        ("eval.py", 1, "error: this is a bug, please report it\n", True),
    ],
)
def test_the_verdict_about_an_end(program, code, err, wrong):
    assert bool(random_input.verdict([program], code, err)) == wrong
