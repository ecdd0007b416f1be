"""What is read as a record, what is refused and in which words, and the score grid."""

import argparse
import json
import math
import re

import pytest

import runs
from records import SUFFIX, Grid, InputError, check_record, read_records

GOOD = {"id": "a", "prompt": "p", "cot": "c", "score": 4}
NEXT = GOOD | {"id": "b"}
OWN = {"instruction": "Дай {x}", "response": "ลองดู", "rubric": {"criteria": "Good?", "1": "No.", "5": "Yes."}}
COTS = NEXT | {"cots": ["c", "d"], "finished": [True, False]}
JUDGED = COTS | {"score_probs": [[0.2] * 5] * 2, "off_grid": [0.0, 0.1], "prediction": 3.0, "decoded": 3.0}
TOO_LARGE = json.dumps(NEXT).replace("4", "1e999").encode()
NOT_JSON = [b"{oops", b'{"id": "b"} {}', b'{"id": "\xff"}', b"[" * 100_000, b"[" + b"9" * 5000 + b"]"]
BAD_LINES = {  # what the message says → second lines of a file
    "not JSON": [*NOT_JSON, NEXT | {"mine": math.nan}, NEXT | {"mine": -math.inf}],
    "surrogates": [NEXT | {"prompt": "\ud800"}, NEXT | {"mine": {"deep": ["\udc00"]}}],
    "a list, not a JSON object": [b"[1]"],
    "not a number": [TOO_LARGE, *(JUDGED | {"prediction": x} for x in ("3", True, 10**400))],
    "'id' is 7, not a string": [NEXT | {"id": 7}],
    "is empty": [NEXT | {"prompt": " \n"}, NEXT | {"cot": ""}],
    "is no text": [OWN | {"rubric": ["Good?"]}, OWN | {"response": " "}],
    "id 'a' was already used in line 1": [GOOD],
    "this stage needs id, prompt, cot, score; or instruction, response and rubric": [{"id": "b"}],
    "'cot' holds 'So the overall score is'; end it before": [NEXT | {"cot": f"Bad.{SUFFIX}1"}],
    "lies outside the grid (1 to 5)": [NEXT | {"score": 0.99}, NEXT | {"score": 5.01}],
    "'cots' does not hold one entry a CoT": [COTS | {"cots": x} for x in ("cd", ["c"], ["c", 1])],
    "'finished' does not hold one entry a CoT": [COTS | {"finished": x} for x in ([1, 0], [], 2)],
    "'off_grid' does not hold one entry a CoT": [JUDGED | {"off_grid": [0.1]}],
    "does not hold 5 probabilities (is --grid right?) a CoT": [JUDGED | {"score_probs": [[0.5, 0.5]] * 2}],
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_a_bad_line_is_named_with_what_is_wrong(message, tmp_path):
    for line in BAD_LINES[message]:
        text = line if isinstance(line, bytes) else json.dumps(line).encode()
        need = [field for field in JUDGED if field in GOOD or field.encode() in text]
        (tmp_path / "bad.jsonl").write_bytes(json.dumps(JUDGED | {"id": "a"}).encode() + b"\n" + text)
        with pytest.raises(InputError, match=rf"\A{tmp_path}/bad.jsonl:2: .*{re.escape(message)}.*\Z"):
            read_records(tmp_path / "bad.jsonl", Grid(), need)


def test_what_is_odd_but_whole_is_read_as_it_was_written(tmp_path):
    """Read a byte order mark, Windows line ends, blank lines, any language, unknown fields, NUL."""
    odd = {"id": "ä", "prompt": "Оцени: 🙂\u2028", "cot": "جيد\u0000", "score": 4.5, "mine": {"kept": [None]}}
    runs.write_whole(path := tmp_path / "odd.jsonl", runs.to_line(GOOD) + runs.to_line(odd))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n{", b"\r\n\r\n{"))
    assert read_records(path, Grid(), GOOD) == [GOOD, odd]


def test_prompts_of_ones_own_are_rendered(lab):
    """Fill in the Prometheus template, with or without a reference; the line number stands in for an id."""
    rows = [OWN | {"reference": "x"}, OWN | {"id": "b", "rubric": "Useful?"}, OWN | {"prompt": "As it is."}]
    first, second, third = read_records(lab.write("own.jsonl", rows), Grid())
    assert [first["id"], second["id"], third["id"], third["prompt"]] == ["1", "b", "3", "As it is."]
    assert "a reference answer that gets a score of 5, and a score rubric" in first["prompt"]
    assert "Дай {x}\n\n###Response to evaluate:\nลองดู\n\n###Reference Answer (Score 5):\nx" in first["prompt"]
    assert first["prompt"].endswith("Rubrics:\n[Good?]\nScore 1: No.\nScore 5: Yes.\n\n###Feedback:")
    assert "eference" not in second["prompt"] and "###Score Rubrics:\nUseful?\n\n" in second["prompt"]


def test_grid_values_nearest_token_and_options_that_are_refused():
    grid = Grid.parse("1=0, 3=50,5=100", "[RESULT]")
    assert grid == (("1", "3", "5"), (0, 50, 100), " [RESULT] ") == Grid.parse(str(grid), grid.suffix)
    assert [grid.tokens[grid.nearest(s)] for s in (0, 24.9, 25, 75, 100)] == ["1", "1", "3", "5", "5"]
    assert "holds '[RESULT]'" in check_record({"id": "a", "cot": "Good. [RESULT] 5"}, grid, ("id",))
    for wrong in ("1", "1,1", "3,2", "a,b", "1=nan,2=3", "1,2=inf", "1,,2"):
        with pytest.raises(InputError, match="--grid"):
            Grid.parse(wrong)
    with pytest.raises(InputError, match="--suffix is empty"):
        Grid.parse("1,2", " ")
    wrong = {runs.COUNT: "0", runs.SEED: "-1 4294967296", runs.WEIGHT: "-0.1 inf nan", runs.SHARE: "-0.1 1.1"}
    for kind, text in ((kind, text) for kind, texts in wrong.items() for text in texts.split()):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not between"):
            kind(text)
