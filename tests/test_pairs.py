"""Pairs from every source, their credit by hand, and what is wrong with a pair."""

import json
import math
import random

import numpy as np
import pytest
from test_data import LEFT_OUT, prepare

from tract import pairs
from tract.records import Grid, InputError, read_records


def response(pair: str, chosen: bool, probs: list[float], **more) -> dict:
    """Make a judged record on the grid 1, 2, 3."""
    expected, decoded = sum(p * v for p, v in zip(probs, (1, 2, 3), strict=True)), 1 + probs.index(max(probs))
    row = {
        "id": f"{pair}{random.random()}",
        "pair": pair,
        "chosen": chosen,
        "prompt": "x",
        "finished": [True],
        "grid": "1=1,2=2,3=3",
        "renormalised": False,
    }
    return (
        row | {"prediction": expected, "decoded": decoded, "score_probs": [probs], "off_grid": [0.0]} | more
    )


def test_credit_ties_and_log_loss_by_hand():
    low, mid, high = [0.8, 0.2, 0.0], [0.2, 0.6, 0.2], [0.0, 0.2, 0.8]
    assert pairs.beats(np.array(high), np.array(low)) == pytest.approx(0.8 + 0.2 * (0.8 + 0.2 / 2))
    assert pairs.beats(np.array(low) / 2, np.array(low)) == pytest.approx(0.5)  # off-grid mass aside
    assert pairs.beats(np.zeros(3), np.array(low)) == 0.5
    rows = [response("a", False, low), response("a", True, mid)]  # right
    rows += [response("b", True, low), response("b", False, [0.9, 0.1, 0.0])]  # right, decoded scores tie
    rows += [response("c", True, mid), response("c", False, mid), response("c", False, mid)]  # one of three
    rows += [response("d", True, low), response("d", False, high)]  # wrong
    (*_, (section, subset, n, means)) = pairs.compare(pairs.gather(rows, ""), resamples=200, seed=0)
    assert (section, subset, n) == ("total", "", 4)
    value = dict(zip(pairs.NAMES, means[0], strict=True))
    assert value["accuracy"] == pytest.approx((1 + 1 + 1 / 3) / 4) and value["ties"] == 1 / 4
    assert value["decoded"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 4) and value["ties_decoded"] == 2 / 4
    sure = [pairs.beats(np.array(a), np.array(b)) for a, b in ((mid, low), (low, [0.9, 0.1, 0]), (low, high))]
    assert value["above"] == pytest.approx((sum(sure) + 0.5) / 4)
    assert value["log_loss"] == pytest.approx(-(sum(map(math.log, sure)) + math.log(0.5)) / 4)
    assert means[1:, 0].std() == pytest.approx(np.std([1, 1, 1 / 3, 0]) / 2, rel=0.2)


def test_sections_weigh_their_pairs_and_the_total_its_sections(lab):
    """One of two pairs right, weighted 3 to 1; in another section all. Broken pairs are left out."""
    good, bad = [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]
    rows, kinds = [], (("a", "math", 3, True), ("b", "code", 1, False), ("c", "chat", 1, True))
    for name, subset, weight, right in kinds:
        common = {"section": "Chat" if name == "c" else "Reasoning", "subset": subset, "weight": weight}
        rows += [response(name, right, good, **common), response(name, not right, bad, **common)]
    rows += [response("lone", True, good), response("two", True, good), response("two", True, bad)]
    out = lab.path / "eval"
    path = lab.write("p.jsonl", rows)
    lab.run("eval", path, "--pairs", "--grid", "1,2,3", "--resamples", 20, "--out", out)
    said = lab.capsys.readouterr().out
    assert f"2 pairs of {path} left out: not one response is chosen, or one is missing: lone, two" in said
    groups = json.loads((out / "metrics.json").read_text())["files"][str(path)]
    found = {(g["section"], g["subset"]): (g["pairs"], g["accuracy"]["value"]) for g in groups}
    assert found["Reasoning", "math"] == (1, 1) and found["Reasoning", ""] == (2, 0.75)
    assert found["total", ""] == (3, pytest.approx(0.875)) and not (out / "figure.png").exists()
    assert "| total " in said and "0.875 [" in said
    assert "likeliest score tied in 0 of 6 records; mean off-grid mass 0.0000\n" in said
    unpaired = rows[0] | {"pair": None}
    for wrong, message in (([rows[0]], "no whole pair"), ([unpaired], "no 'pair' and 'chosen'")):
        args = (lab.write("q.jsonl", wrong), "--pairs", "--grid", "1,2,3", "--out", lab.path / "e2")
        assert message in lab.fail("eval", *args)[1]


def test_a_pair_without_prediction_is_left_out_and_one_at_odds_with_itself_refused(capsys):
    rows = [response(name, chosen, [0.0, 0.0, 1.0]) for name in "ab" for chosen in (True, False)]
    rows[1]["prediction"] = None
    assert pairs.gather(rows, "p") == [rows[2:]]
    assert "1 pairs of p left out: a record has no prediction: a" in capsys.readouterr().out
    for change in ({"section": "Chat"}, {"subset": "math"}, {"weight": 2}):
        with pytest.raises(InputError, match=f"'{next(iter(change))}' differs within its pair"):
            pairs.gather([*rows[:3], rows[3] | change], "p")


def test_files_are_compared_on_pairs_that_are_whole_in_all(lab):
    """Of a pair of three, one response was too long for one judge: with two it would be easier."""
    good, bad = [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]
    rows = [response("a", True, good), response("a", False, bad)]
    rows += [response("b", k == 0, [good, good, bad][k], pair_size=3) for k in range(3)]
    both = lab.write("one.jsonl", rows), lab.write("other.jsonl", [*rows[:3], rows[4]])
    lab.write("other.run.json", [{"arguments": {"out": "other.jsonl"}, "too_long": 1}])
    lab.run("eval", *both, "--pairs", "--resamples", 5, "--out", lab.path / "eval")
    said = lab.capsys.readouterr().out
    assert f"1 pairs of {both[1]} left out: not one response is chosen, or one is missing: b\n" in said
    assert "1 pairs left out: not whole in all files: b\n" in said
    assert "other.jsonl: 95 % bootstrap intervals over pairs\n\n1 more records were too long" in said
    files = json.loads((lab.path / "eval/metrics.json").read_text())["files"]
    assert [groups[-1]["pairs"] for groups in files.values()] == [1, 1]
    assert files[str(both[0])][-1]["accuracy"]["value"] == 1


def test_random_scores_are_right_in_one_half_of_the_pairs():
    draw = np.random.default_rng(0)
    rows = [
        response(f"{i}", k == 0, draw.dirichlet([1, 1, 1]).tolist()) for i in range(400) for k in range(2)
    ]
    *_, means = pairs.compare(pairs.gather(rows, ""), resamples=500, seed=0)[-1]
    samples = dict(zip(pairs.NAMES, means.T, strict=True))
    for name in ("accuracy", "decoded"):
        low, high = np.percentile(samples[name], [2.5, 97.5])
        assert low < 0.5 < high and 0.06 < high - low < 0.12


SOURCES = {  # name of the file → rows
    "rewardbench": [
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "No.", "subset": "math-prm", "id": 7},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "No.", "subset": "llmbar-natural", "id": 8},
        {"prompt": "Hi", "chosen": " ", "rejected": "No.", "subset": "hep-go", "id": 9},
    ],
    "v2": [
        {
            "prompt": "Hi",
            "chosen": ["Hello."],
            "rejected": ["a", "b", "c"],
            "num_correct": 1,
            "subset": "Focus",
        },
        {"prompt": "Hi", "chosen": ["a", "b"], "rejected": ["c"], "num_correct": 2, "subset": "Ties"},
    ],
    "Natural": [
        {"input": "Hi", "output_1": "No.", "output_2": "Hello.", "label": 2},
        {"input": "Hi", "output_1": "No.", "output_2": "Hello.", "label": 3},
    ],
    "preference": [
        {"chosen_instruction": 'Rate.\n###Feedback: "', "rejected_instruction": "Bad.\n###Feedback:"}
    ],
}


def test_every_source_is_told_by_its_rows(lab):
    for name, rows in SOURCES.items():
        (lab.path / f"{name}.json").write_text(json.dumps(rows))
    paths = [lab.path / f"{name}.json" for name in SOURCES]
    said = prepare(lab, "pairs", *paths, "--out", lab.path / "pairs.jsonl")
    assert LEFT_OUT.findall(said) == ["1: not one", "1: of the", "1: 'label' is"]
    made = read_records(lab.path / "pairs.jsonl", Grid())
    assert [r["pair"] for r in made if r["chosen"]] == [
        *("rewardbench-0000", "rewardbench-0001", "v2-0000", "Natural-0000", "preference-0000")
    ]
    assert [(r["section"], round(r["weight"], 2)) for r in made if r["chosen"]] == [
        *(("Reasoning", 2.2), ("Chat Hard", 1), ("Focus", 1), ("Natural", 1), ("preference", 1))
    ]
    assert [r["response"] for r in made if r["chosen"] and "response" in r] == ["Hello."] * 4
    assert len(made) == 2 + 2 + 4 + 2 + 2 and "###Response to evaluate:\nHello." in made[0]["prompt"]
    assert [r["prompt"] for r in made[-2:]] == ["Rate.\n###Feedback:", "Bad.\n###Feedback:"]
