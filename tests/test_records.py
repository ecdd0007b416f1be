"""What is read as a record, what is refused and in which words, and the score grid."""

import argparse
import json
import math
import re

import pytest

from tract import runs
from tract.checks import check_record, find_verdict
from tract.prompt import SUFFIX, render_prompt
from tract.records import Grid, InputError, read_records

GOOD = {"id": "a", "prompt": "p", "cot": "c", "score": 4}
NEXT = GOOD | {"id": "b"}
OWN = {"instruction": "Дай {x}", "response": "ลองดู", "rubric": {"criteria": "Good?", "1": "No.", "5": "Yes."}}
COTS = NEXT | {"cots": ["c", "d"], "finished": [True, False]}
JUDGED = COTS | {"score_probs": [[0.2] * 5] * 2, "off_grid": [0.0, 0.1], "prediction": 3.0, "decoded": 3.0}
TOO_LARGE = json.dumps(NEXT).replace("4", "1e999").encode()
NOT_JSON = [b"{oops", b'{"id": "b"} {}', b'{"id": "\xff"}', b"[" * 100_000, b"[" + b"9" * 5000 + b"]"]
# What RewardBench, UltraFeedback and others have beside their prompts
BESIDE = (
    "response instruction rubric reference completions answer response_a responseB output_1 rejected".split()
)
BAD_LINES = {  # what the message says → second lines of a file
    "not JSON": [*NOT_JSON, NEXT | {"mine": math.nan}, NEXT | {"mine": -math.inf}, b'{"mine": 1e999}'],
    "surrogates": [NEXT | {"prompt": "\ud800"}, NEXT | {"mine": {"deep": ["\udc00"]}}],
    "a list, not a JSON object": [b"[1]"],
    "not a number": [TOO_LARGE, *(JUDGED | {"prediction": x} for x in ("3", True, 10**400))],
    "not a string": [
        NEXT | x for x in ({"id": 7.5}, {"id": True}, {"id": ["b"]}, {"pair": 1.5}, {"subset": 1})
    ],
    "is empty": [NEXT | {"prompt": " \n"}, NEXT | {"cot": ""}, NEXT | {"section": ""}],
    "is no text": [OWN | {"rubric": ["Good?"]}, OWN | {"response": 5}, OWN | {"instruction": " "}],
    "'rubric' is missing; a record without a prompt needs": [OWN | {"rubric": None}],
    "'rubric' has no text in '5'": [OWN | {"rubric": OWN["rubric"] | {"5": x}} for x in (None, ["a"], " ")],
    "'rubric' has no text in 'criteria'": [OWN | {"rubric": {"1": "No."}}],
    "'rubric' describes 1, 5, 6; the scores": [OWN | {"rubric": OWN["rubric"] | {"6": "x"}}],
    "'rubric' describes 1, 4; the scores": [OWN | {"rubric": {"criteria": "Good?", "1": "x", "4": "y"}}],
    "does not contain the text of": [NEXT | {field: ["p", "Hello."]} for field in BESIDE]
    + [
        NEXT | OWN,
        NEXT | {"student_answer": "Hi."},
        NEXT | {"response": [{"role": "user", "content": "Hi."}]},
    ],
    "its prompt asks for the scores A=1,B=5, not 1=1,": [NEXT | {"response": "p", "grid": "A=1,B=5"}],
    "'chosen' is \"Hello.\", not true or false; data/pairs/prepare.py": [NEXT | {"chosen": "Hello."}],
    "not a list of numbers": [NEXT | {"ratings": x} for x in (4, ["4"], {"a": 4}, [True])],
    "not a number above 0": [NEXT | {"weight": x} for x in (0, -1, "1", [1], True)],
    "'renormalised' is 1, not true or false": [JUDGED | {"id": "b", "renormalised": 1}],
    "'prediction' is missing": [JUDGED | {"id": "b", "prediction": None, "renormalised": False}],
    "id 'a' was already used in": [GOOD],
    "this stage needs id, prompt, cot, score; or instruction, response and rubric": [{"id": "b"}],
    "'cot' holds 'So the overall score is'; end it before": [NEXT | {"cot": f"Bad.{SUFFIX}1"}],
    "lies outside the grid (1 to 5)": [NEXT | {"score": 0.99}, NEXT | {"score": 5.01}],
    "'cots' does not hold one entry a CoT": [COTS | {"cots": x} for x in ("cd", ["c"], ["c", 1])],
    "its CoTs were to end in 'Score:', not 'So the overall score is'": [COTS | {"suffix": "Score:"}],
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
    mine = "As it is: Дай\n{x} | ลองดู | Good? No. Yes."
    rows = [OWN | {"reference": "x"}, OWN | {"id": "b", "rubric": "Useful?"}, OWN | {"prompt": mine}]
    first, second, third = read_records(lab.write("own.jsonl", rows), Grid())
    assert [first["id"], second["id"], third["id"], third["prompt"]] == ["1", "b", "3", mine]
    assert "a reference answer that gets a score of 5, and a score rubric" in first["prompt"]
    assert "Дай {x}\n\n###Response to evaluate:\nลองดู\n\n###Reference Answer (Score 5):\nx" in first["prompt"]
    assert first["prompt"].endswith("Rubrics:\n[Good?]\nScore 1: No.\nScore 5: Yes.\n\n###Feedback:")
    assert "eference" not in second["prompt"] and "###Score Rubrics:\nUseful?\n\n" in second["prompt"]
    assert [check_record(row, Grid(), ("prompt",)) for row in (first, second)] == [None, None]  # once more
    odd = OWN | {"response": "", "reference": " ", "prompt": None}
    (empty,) = read_records(lab.write("odd.jsonl", [odd]), Grid())
    assert "evaluate:\n\n\n###Score" in empty["prompt"] and "eference" not in empty["prompt"]


ASKED = {  # grid → what the prompt asks for, in a sentence and in the format; what a reference is worth
    "1,2,3,4,5": ("an integer between 1 and 5", "an integer number between 1 and 5", "5"),
    "0,1,2,3": ("an integer between 0 and 3", "an integer number between 0 and 3", "3"),
    "1,3,5": ("one of 1, 3, 5", "one of 1, 3, 5", "5"),
    "1=0,2=5": ("one of 1 (worth 0), 2 (worth 5)", "one of 1, 2", "2 (worth 5)"),
    "8,9,0=10": ("one of 8, 9, 0 (worth 10)", "one of 8, 9, 0", "0 (worth 10)"),
    "A=1,B=2.5": ("one of A (worth 1), B (worth 2.5)", "one of A, B", "B (worth 2.5)"),
}


@pytest.mark.parametrize("grid", ASKED)
def test_the_prompt_asks_for_the_scores_and_the_words_that_are_waited_for(grid):
    """Describe the first and the last score by tokens or values, also in the way of prometheus-eval."""
    score, number, best = ASKED[grid]
    for suffix in (SUFFIX, "[RESULT]"):
        grid = Grid.parse(str(grid), suffix)
        names = [[f"score{name}_description" for name in grid.tokens], [f"{v:g}" for v in grid.values]]
        for first, last in ((keys[0], keys[-1]) for keys in (grid.tokens, *names)):
            rubric = {"criteria": "Good?", first: "No.", last: "Yes."}
            prompt = render_prompt(OWN | {"rubric": rubric, "reference": "x"}, grid)
            assert f"write a score that is {score}. You should" in prompt
            assert f'(write a feedback for criteria) {suffix.strip()} ({number})"\n4. Please' in prompt
            assert f"a reference answer that gets a score of {best}, and" in prompt
            assert f"Answer (Score {grid.tokens[-1]}):\nx" in prompt
            assert f"[Good?]\nScore {grid.tokens[0]}: No.\nScore {grid.tokens[-1]}: Yes.\n" in prompt


VERDICTS = """[RESULT] 4 | A [result] b. | So the overall score is good. | So the overall: 3 | Score: 4
**4** | 4 | It is fine. 4 | Rating: 4/5. | I give it a 4 out of 5 | Overall score: 4. | **Score:** 4
Final Score (1-5): 4.5 | I'd rate this response 4/5. | Rating: [[4]] | <score>4</score> | {"score": 4}
My score for it is a 4. | It deserves a score of 4. | This response would be a Score 2. | Score: 4 (good)
Good, hence a score of 4. | It would be a 4. | Clear, thus a 5.
Final Score: **4**/5 | The overall score is 4 | Fine. 4 stars | Fine.⏎4⏎ | Fine!⏎⏎###Score: 4"""
REASONS = """A man / A man: same, 5. | same, 4. Only in 2: in 4. | It is about COVID-19. | Meets a score of 5.
Overall the sum is 4. | So the overall tone is kind. But it is short. | It answers part 4.
Right steps: 3 | Ranked No. 4. | Dated 1. May 2020. | Not a perfect score (5). | 2 + 2 is 4.
the score 4 criteria. | score: high | So the overall idea is right. | Its chess rating is 2000.
The right total would be 12. | It adds 2 and 2, so the answer would be 4. | Hence 12. | Thus, x is 3."""


def test_a_cot_that_gives_its_score_away_is_refused_and_reasoning_is_not(lab):
    """Refuse announced and closing scores, where the CoT is read; a letter or a word can be a score, too."""
    verdicts, reasons = (text.replace("\n", " | ").split(" | ") for text in (VERDICTS, REASONS))
    assert [cot for cot in verdicts if not find_verdict(cot.replace("⏎", "\n"), Grid())] == []
    assert [cot for cot in reasons if find_verdict(cot, Grid())] == []
    assert not any(find_verdict(row["cot"], Grid()) for row in lab.rows)
    letters, words = Grid.parse("A=1,B=2"), Grid.parse("bad=1,good=2", "My verdict:")
    assert find_verdict("It is fine. B", letters) and not find_verdict("It is plan B.", letters)
    assert find_verdict("Verdict: good", words) and find_verdict("My verdict: none", words)
    assert not find_verdict("It is good.", words)
    assert "'cot' holds 'Score: 4'; end it before" in check_record(NEXT | {"cot": "Score: 4"}, Grid(), GOOD)


def test_what_is_not_read_is_not_checked_and_ids_may_be_numbers(lab):
    unread = {"cot": f"x{SUFFIX}", "cots": 1, "finished": 1, "prediction": "x", "grid": 5, "renormalised": 3}
    rows = [GOOD | unread | {"id": 7}, NEXT | {"cot": "", "pair": 3, "weight": None, "ratings": None}]
    first, second = read_records(lab.write("rows.jsonl", rows), Grid(), ("id", "prompt"))
    assert first == GOOD | unread | {"id": "7"} and second == NEXT | {"cot": "", "pair": "3"}
    with pytest.raises(InputError, match=r"2: id '7' was already used in .*same.jsonl:1;"):
        read_records(lab.write("same.jsonl", [GOOD | {"id": 7}, GOOD | {"id": "7"}]), Grid())
    judged = [JUDGED | {"prompt": None, "response": "unseen", "prediction": None, "renormalised": True}]
    need = [field for field in JUDGED if field not in GOOD]
    assert read_records(lab.write("judged.jsonl", judged), Grid(), need) == judged


def test_grid_values_nearest_token_and_options_that_are_refused():
    grid = Grid.parse("1=0, 3=50,5=100", "[RESULT]")
    assert grid == (("1", "3", "5"), (0, 50, 100), " [RESULT] ") == Grid.parse(str(grid), grid.suffix)
    assert [grid.tokens[grid.nearest(s)] for s in (0, 24.9, 25, 75, 100)] == ["1", "1", "3", "5", "5"]
    assert "holds '[RESULT]'" in check_record({"id": "a", "cot": "Good. [RESULT] 5"}, grid, ("id", "cot"))
    assert Grid.parse("1,2,3,4,5,6,7,8,9,0=10").values == tuple(range(1, 11))
    assert Grid.parse("A=1,B=2,C=3") == (("A", "B", "C"), (1, 2, 3), SUFFIX)
    tenths = Grid.parse("0,.1,.2,.3")  # halves up, where floats have no halves, too
    assert [tenths.nearest(s) for s in (0.05, 0.15, 0.25, 0.1499)] == [1, 2, 3, 1]
    third = Grid.parse(f"1=0,2={1 / 3}")
    assert Grid.parse(str(third)) == third
    with pytest.raises(InputError, match="--grid 1,9e6: losses in fp32 can't hold it"):
        Grid.parse("1,9e6")
    for wrong in ("1", "1,1", "3,2", "a,b", "1=nan,2=3", "1,2=inf", "1,,2", "=1,2", "1-10", "1,2,9,0"):
        with pytest.raises(InputError, match=r"--grid.*for 1 to 10: 1,2,3,4,5,6,7,8,9,0=10 or letters"):
            Grid.parse(wrong)
    with pytest.raises(InputError, match="--suffix is empty"):
        Grid.parse("1,2", " ")
    wrong = {runs.COUNT: "0", runs.SEED: "-1 4294967296", runs.WEIGHT: "-0.1 inf nan", runs.SHARE: "-0.1 1.1"}
    for kind, text in ((kind, text) for kind, texts in wrong.items() for text in texts.split()):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not between"):
            kind(text)
