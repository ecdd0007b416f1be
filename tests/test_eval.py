"""Metrics by hand, paired intervals, and nothing dropped in silence."""

import base64
import json
import os
import subprocess
import sys
import tracemalloc
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.axes import Axes

import eval
from tract import page, scores
from tract.records import Grid, InputError
from tract.scores import off_grid_line

WIDE = "1=0,2=25,3=50,4=75,5=100"


def predictions(n: int) -> list[dict]:
    """Make records whose prediction is the true score, with all mass on it."""
    rows = []
    for i, y in enumerate(np.random.default_rng(0).integers(1, 6, n).tolist()):
        row = {"id": f"r{i}", "score": y, "finished": [i % 4 != 0], "off_grid": [0.25], "prediction": y}
        row |= {"decoded": y, "score_probs": [[float(k == y) for k in range(1, 6)]]}
        rows.append(row | {"grid": str(Grid()), "renormalised": False})
    return rows


def read(path, grid=None, cots=None, renormalise=False) -> tuple[list[dict], Grid]:
    return scores.read_predictions(str(path), grid, cots, renormalise)


def evaluate(lab, *arguments) -> tuple:
    """Run eval.py; returns its entry for each file, and last what it prints."""
    out = lab.path / f"eval{len(list(lab.path.iterdir()))}"
    lab.run("eval", "--resamples", 20, "--out", out, *arguments)
    report = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    return *report["files"].values(), lab.capsys.readouterr().out


def test_metrics_and_reliability_by_hand_and_without_torch():
    p, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.0, 3.0, 2.0, 4.0])
    by_hand = {"pearson": 5.5 / 43.75**0.5, "spearman": 0.8, "kendall": 4 / 6, "rmse": 0.75**0.5, "mae": 0.75}
    by_hand["spread"] = (8.75 / 5) ** 0.5
    assert {name: metric(p, y) for name, metric in eval.METRICS.items()} == pytest.approx(by_hand)
    by_hand = {"kappa": 1 - 0.75 / np.mean((p[:, None] - y) ** 2), "exact": 0.25, "within_one": 1.0}
    assert {name: metric(p, y) for name, metric in eval.AGREEMENT.items()} == pytest.approx(by_hand)
    assert eval.AGREEMENT["within_one"](p, y + np.eye(4)[2]) == 1 and eval.ties(p[[0, 0, 1, 1, 1]]) == 0.4
    length = np.array([3.0, 1.0, 4.0, 2.0])  # what is left of p and of length without y correlates so
    rest = [x - np.polyval(np.polyfit(y, x, 1), y) for x in (p, length)]
    assert eval.length_bias(p, y, length) == pytest.approx(np.corrcoef(*rest)[0, 1])
    points = scores.reliability(predictions(100), Grid())
    assert sum(p["n"] for p in points if p["observed"] == p["predicted"] in (0, 1)) == 500
    code = "import sys, eval; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_are_compared_in_pairs_and_all_is_counted(lab):
    """Resample all files alike: a constant offset has no interval. Tell files by their whole path."""
    off, rows = 0.5 + 0.1 * np.sin(np.arange(200)), predictions(200)
    near = [row | {"prediction": row["score"] + x} for row, x in zip(rows, off, strict=True)]
    far = [row | {"prediction": row["prediction"] + 1} for row in near]
    near[3]["score"], far[4]["cot"] = None, "So the overall score is text where the suffix is another."
    far = [row | {"grid": "1,2,3,4,5=7"} for row in far[:150]]
    paths = lab.write("preds-t0.7", near), lab.write("preds-t0.9", far)
    first, second, printed = evaluate(lab, *paths, "--resamples", 200)
    names, common = ("grid", "records", "without_score", "not_in_all_files"), np.delete(off[:150], 3)
    assert [first[name] for name in names] == ["1=1,2=2,3=3,4=4,5=5", 200, 1, 50]
    assert [second[name] for name in names] == ["1=1,2=2,3=3,4=4,5=7", 150, 0, 1]
    assert second["difference"]["prediction"]["mae"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    value, low, high = first["prediction"]["mae"].values()
    assert low < value < high and value == pytest.approx(common.mean())
    assert high - low == pytest.approx(2 * 1.96 * common.std() / np.sqrt(149), rel=0.1)
    assert all(f"{n}: {path}: " in printed for n, path in enumerate(paths, 1)) and "| 2 decoded " in printed
    assert f"lowest RMSE: {paths[0]}" in printed and printed.count("| kappa ") == 2
    assert "149 records" in printed and "1 without score, 50 not in all files" in printed
    assert printed.count("mean off-grid mass 0.2500: as much") == 2


def test_other_values_fewer_cots_and_renormalised(lab):
    """Compute predictions anew, with half the mass on x or, after a second CoT, on 100 − x."""
    rows = predictions(30)
    for i, row in enumerate(rows):
        half = [p / 2 for p in row["score_probs"][0]]
        row |= {"score_probs": [half, half[::-1]], "finished": [True, i > 0], "off_grid": [0.5, 0.3]}
        row |= {"score": 25 * (row["score"] - 1), "ratings": [0, 25 * (i % 3)]}
    arguments = [lab.write("p.jsonl", rows), "--grid", "1=0,2=25,3=50,4=75,5=100"]
    both, printed = evaluate(lab, *arguments)
    assert both["prediction"]["pearson"]["value"] is None and "undefined" in printed  # constant
    assert both["against_others"]["pearson"] is None
    assert both["prediction"]["mae"]["value"] == pytest.approx(np.mean([abs(r["score"] - 25) for r in rows]))
    assert (both["cots"], both["unfinished_rate"], both["off_grid_mean"]) == (60, 1 / 60, 0.4)
    first, _ = evaluate(lab, *arguments, "--cots", 1, "--renormalise")
    assert first["prediction"]["mae"]["value"] == first["unfinished_rate"] == 0 and first["cots"] == 30


def test_records_of_a_group_are_drawn_together(lab):
    """Four copies of a record are as much evidence as one: the same intervals."""
    rows = [row | {"prediction": row["score"] + (i % 7) / 2} for i, row in enumerate(predictions(40))]
    copies = [row | {"id": f"{row['id']}/{k}", "question": row["id"]} for row in rows for k in range(4)]
    one, _ = evaluate(lab, lab.write("one", rows))
    four, printed = evaluate(lab, lab.write("four", copies), "--group", "question")
    same = ("pearson", "kendall", "rmse", "kappa")
    by_copies = [four["prediction"][name][end] for name in same for end in ("low", "high")]
    assert by_copies == pytest.approx(
        [one["prediction"][name][end] for name in same for end in ("low", "high")]
    )
    assert "over 40 groups of like 'question'\n" in printed
    few = [row | {"question": i % 4} for i, row in enumerate(rows)]
    assert (
        "over 4 groups of like 'question': so few say little"
        in evaluate(lab, lab.write("few", few), "--group", "question")[-1]
    )
    for field, message in (
        ("topic", "record 'r0' has no text or whole number there"),
        ("grid", "all records are of one group"),
    ):
        code, said = lab.fail("eval", lab.path / "one", "--out", lab.path / "x", "--group", field)
        assert code == 2 and f"--group {field}: {message}" in said


def test_resamples_are_drawn_one_at_a_time_and_are_those_of_one_draw():
    """Draw a thousand of 2,001 records in the memory of a few; all at once they take 16 MB."""
    n = 2001
    drawn = np.random.default_rng(3).integers(0, n, (1000, n))
    tracemalloc.start()
    picks = eval.draw_resamples(list(range(n)), 1000, 3)
    for pick, wanted in zip(picks, [np.arange(n), *drawn], strict=True):
        assert np.array_equal(pick, wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_what_cannot_be_compared_is_refused(lab):
    path, out = lab.write("p.jsonl", predictions(2)), ("--out", lab.path / "eval")
    wrong = {"scores differ": {"score": 1.5}, "is missing": {"decoded": None}, "in common": {"id": "x"}}
    for message, change in wrong.items():
        assert message in lab.fail("eval", path, lab.write("q.jsonl", [predictions(1)[0] | change]), *out)[1]
    assert "'r0' has fewer CoTs than --cots 2" in lab.fail("eval", path, "--cots", 2, *out)[1]
    empty = lab.write("q.jsonl", [predictions(1)[0] | {"score_probs": [[0.0] * 5]}])
    assert "no record with score and prediction" in lab.fail("eval", empty, "--renormalise", *out)[1]
    assert "is given twice" in lab.fail("eval", path, path, *out)[1] and not out[1].exists()
    assert "is there already" in lab.fail("eval", path, "--out", lab.path)[1]


def test_agreement_is_of_the_nearest_grid_points_and_the_ceiling_of_the_raters(lab):
    """Round to a wide grid; length and ratings count where the records have them."""
    rows = predictions(40)
    for i, row in enumerate(rows):
        row["score"] = 25 * (row["score"] - 1)
        row |= {"prediction": min(row["score"] + 12, 100), "decoded": max(row["score"] - 30, 0)}
        row |= {"response": "x" * (i % 7), "ratings": [i % 5, i % 5 + 1, i % 5 + 1], "grid": WIDE}
    three = [lab.write(f"{name}.jsonl", rows) for name in "abc"]
    found, printed = evaluate(lab, three[0])
    assert found["prediction"]["exact"]["value"] == found["decoded"]["within_one"]["value"] == 1
    assert found["decoded"]["exact"]["value"] == np.mean([row["score"] == 0 for row in rows])
    assert abs(found["prediction"]["length_bias"]["value"]) < 1 and "| length_bias " in printed
    rmse = ((1 + 2 * 0.25) / 3) ** 0.5  # off by 1, by one half, by one half
    assert "| 120 ratings, against the mean" in printed and f" | {rmse:.3f} " in printed
    others = [(i % 5 + 1 - k / 2, row["prediction"]) for i, row in enumerate(rows) for k in (0, 1, 1)]
    assert found["against_others"]["rmse"] == pytest.approx(
        np.sqrt(np.mean([(a - b) ** 2 for a, b in others]))
    )
    *_, printed = evaluate(lab, *three)
    assert "| 3 prediction " in printed and "decoded" not in printed


def test_a_file_says_its_grid_and_whether_it_was_renormalised(lab):
    rows = predictions(3)
    for row in rows:
        row |= {"score": 25 * (row["score"] - 1), "grid": WIDE, "renormalised": True, "finished": [True] * 2}
        row |= {"score_probs": [[p / 2 for p in row["score_probs"][0]]] * 2, "off_grid": [0.5] * 2}
        row["prediction"] = row["score"]
    path = lab.write("x", rows)
    for options in ({}, {"cots": 1}, {"grid": WIDE}):
        found, grid = read(path, **options)
        assert str(grid) == WIDE
        assert [row["prediction"] for row in found] == [row["score"] for row in rows]


DIFFERING = [  # of the second of two records, options, message
    ({"grid": "1=1,2=2,3=3,4=4,5=7"}, {}, "record 'r1': 'grid' or 'renormalised' differs"),
    ({"grid": "1=0,5=100", "score_probs": [[0.5, 0.5]], "score": 70}, {}, "p:2: score 70 lies outside"),
    ({"renormalised": True}, {"cots": 1}, "record 'r1': 'grid' or"),
    ({"grid": None}, {}, "p:2: field 'grid' is missing"),
    ({}, {"grid": "A=1,B=2,C=3,D=4,E=5"}, "p is on 1=1,2=2,3=3,4=4,5=5"),
    ({}, {"grid": "5=1,4=2,3=3,2=4,1=5"}, "give the same scores, with other values"),
]


@pytest.mark.parametrize("change, options, message", DIFFERING)
def test_rows_that_disagree_are_refused(change, options, message, lab):
    first, second = predictions(2)
    path = lab.write("p", [first, second | change])
    with pytest.raises(InputError, match=message):
        read(path, **options)


def test_what_is_no_whole_file_of_predictions_is_refused(lab):
    path = lab.write("p", predictions(2))
    path.write_bytes(path.read_bytes()[:-40])
    os.mkfifo(lab.path / "pipe")
    cots = lab.write("cots", [{"id": "a", "prompt": "p", "cots": ["c"], "finished": [True], "score": 3}])
    wrong = {
        path: "p:2: not JSON",
        cots: "'prediction' is missing",
        lab.write("empty", []): "no records in it",
    }
    wrong |= {lab.path: "a folder or a pipe", lab.path / "pipe": "a folder or a pipe"}
    wrong |= {lab.path / "none": "none: no such file; give a JSONL file of predict.py"}
    wrong |= {lab.write("odd", [predictions(1)[0] | {"grid": "a,b"}]): "odd:1: its 'grid' is none"}
    for path, message in wrong.items():
        with pytest.raises(InputError, match=message):
            read(path)


@pytest.mark.pictures
def test_records_without_prediction_are_left_out_and_ties_are_counted(lab, monkeypatch):
    """Table, counts and figure are of the same records, in both files."""
    drawn, plot = [], Axes.plot

    def spy(axis, x, y, *style, **options):
        drawn.extend([len(x)] if style == (".",) else [])
        return plot(axis, x, y, *style, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    rows = [row | {"renormalised": True} for row in predictions(20)]
    shorter = lab.write("b", rows[:18])
    rows[0] |= {"prediction": None, "score_probs": [[0.0] * 5]}
    rows[1]["score_probs"] = [[0.1, 0.3, 0.1, 0.3, 0.1]]
    first, second, printed = evaluate(lab, lab.write("a", rows), shorter)
    names = ("records", "without_score", "without_prediction", "not_in_all_files", "tied_likeliest")
    assert [first[name] for name in names] == [20, 0, 1, 2, 1] and first["renormalised"]
    assert [second[name] for name in names] == [18, 0, 0, 1, 0] and drawn == [17, 17]
    assert "a: 20 records, 0 without score, 2 not in all files, 1 without prediction" in printed
    assert "likeliest score tied in 1 records, mean off-grid mass 0.2500\n" in printed


def test_ratings_may_be_missing_in_one_of_two_files(lab):
    rows = [row | {"ratings": [1, 2]} for row in predictions(9)]
    paths = lab.write("with", rows), lab.write("without", predictions(9))
    first, second, printed = evaluate(lab, *paths)
    assert first["against_others"]["ratings"] == 18 and second["against_others"] is None
    assert printed.count("| one rater ") == printed.count("ratings, against the mean") == 1


def test_an_untrained_judge_is_told_from_one_that_is_sure_of_the_lowest_score():
    row = {"id": "a", "prediction": 0.98, "off_grid": [0.02], "renormalised": False}
    low = row | {"prediction": 0.6, "off_grid": [0.4]}
    assert off_grid_line([row] * 20, Grid()) == "mean off-grid mass 0.0200"
    assert "mass 0.0390: as much of" in off_grid_line([row] * 19 + [low], Grid())
    assert "; 1 predictions lie below 1. --renorm" in off_grid_line([row] * 19 + [low], Grid())


def test_a_killed_or_another_eval_is_in_nobodys_way(lab, monkeypatch):
    command = ("eval", lab.write("p", predictions(9)), "--resamples", 5, "--out")
    (lab.path / "out.part").mkdir()
    left = lab.write("out.part/metrics.json", [])
    lab.run(*command, lab.path / "out")
    assert (lab.path / "out").stat().st_mode == left.parent.stat().st_mode  # for others to read
    other = lab.path / "other"

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval, "draw", interrupt)
    assert lab.fail(*command, other)[0] == 130 and not other.exists()
    monkeypatch.setattr(eval, "draw", lambda *_: other.mkdir() or b"")  # another eval.py was faster
    code, said = lab.fail(*command, other)
    assert code == 2 and "is there already" in said and not list(other.iterdir())
    assert {entry.name for entry in lab.path.iterdir()} == {"p", "out", "out.part", "other"}
    assert left.is_file()


@pytest.mark.pictures
def test_any_name_of_a_file_can_be_drawn(lab):
    """Formulas, escapes, a long name and letters that no font here has, without a word about it."""
    files = [lab.write(name, predictions(5)) for name in ("$a_b^$", "\\frac{$x", "評価" * 30, "long " * 45)]
    with warnings.catch_warnings(action="error"):
        lab.run("eval", *files, "--resamples", 5, "--out", lab.path / "eval")


class Page(HTMLParser):
    """Hold what a browser would find in report.html: cells of tables, texts, contents of scripts, images."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.sources, self.found = [], [], {"td": [], "pre": [], "script": []}
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag in self.found:
            self.found[tag].append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] in self.found:
            self.found[self.tags[-1]][-1] += data


HOSTILE = "</script><script>alert(1)</script><!-- & &amp; \u2028 {{ 7 * 7 }} \x00 \r\n 評"


@pytest.mark.pictures
def test_the_page_holds_tables_figure_and_records_and_text_stays_text(lab):
    """Read the page as a browser does: what is in it equals what was printed, drawn and given."""
    rows = predictions(6)
    for row in rows:
        row |= {"id": row["id"] + HOSTILE, "prompt": HOSTILE, "cots": [HOSTILE, ""]}
        row |= {"score_probs": [[0.1, 0.2, 0.3, 0.2, 0.1], [0, 0, 0, 0, 0.5]], "off_grid": [0.1, 0.5]}
        row["finished"] = [True, False]
    rows[0]["score"] = 3.5
    changed = [row | {"prompt": "another"} for row in rows[:1]] + rows[1:5]
    changed[1] = {name: value for name, value in changed[1].items() if name != "prompt"} | {"cots": {"a": 1}}
    paths = lab.write("<b>&amp;", rows), lab.write("b", changed)
    lab.run("eval", *paths, "--resamples", 5, "--out", lab.path / "eval")
    printed = lab.capsys.readouterr().out
    page = Page((lab.path / "eval/report.html").read_text("utf-8"))
    lines = [line for line in printed.splitlines() if line.startswith("|") and "---" not in line]
    cells = [cell.strip() for line in lines for cell in line[1:-1].split("|")]
    assert [cell.strip() for cell in page.found["td"]] == cells and len(cells) > 50
    assert f"1: {paths[0]}: 6 records" in page.found["pre"][1]
    figure = base64.b64encode((lab.path / "eval/figure.png").read_bytes()).decode()
    assert page.sources == [f"data:image/png;base64,{figure}", "#"]  # nothing comes from elsewhere
    data, _ = page.found["script"]  # two scripts: no text has begun a third
    assert "<" not in data and not {"b", "link"} & set(page.tags)
    first, second = json.loads(data)
    assert [first["path"], first["scores"]] == [str(paths[0]), [1, 2, 3, 4, 5, "off the grid"]]
    names = ("id", "score", "prediction", "prompt", "cots", "finished", "score_probs", "off_grid")
    for entry, row in zip(first["rows"], rows[:5], strict=True):
        assert [entry[name] for name in names] == [row[name] for name in names]
        assert entry["expected"] == pytest.approx([0.1 + 0.4 + 0.9 + 0.8 + 0.5, 2.5])
    assert first["rows"][0]["nearest"] == 3  # halves up: to 4
    prompts = [entry.get("prompt") for entry in second["rows"]]  # none where it is the same
    assert prompts == ["another", "", None, None, None] and second["rows"][1]["cots"] == []


def test_the_page_keeps_to_its_room_and_says_so(lab, monkeypatch, capsys):
    """List those that one of the two files judges worst, in the order of the file, at least one."""
    rows = [row | {"prompt": "é" * 1000} for row in predictions(20)]  # 6,000 bytes of JSON each, in two files
    errors = {3: 2, 5: 1, 11: 4, 17: 3}  # of which record, in the second file
    changed = [row | {"prediction": row["score"] + errors.get(i, 0)} for i, row in enumerate(rows)]
    paths = lab.write("a", rows), lab.write("b", changed)
    for room, listed in ((40_000, ["r3", "r11", "r17"]), (5, ["r11"])):
        monkeypatch.setattr(page, "ROOM", room)
        lab.run("eval", *paths, "--resamples", 5, "--out", lab.path / f"eval{room}")
        line = f"report.html lists the {len(listed)} of 20 records with the largest errors\n"
        html = Page((lab.path / f"eval{room}/report.html").read_text("utf-8"))
        for entries in json.loads(html.found["script"][0]):
            assert [entry["id"] for entry in entries["rows"]] == listed
        assert capsys.readouterr().out.endswith(line) and html.found["pre"][-1].strip().endswith(line.strip())
        assert json.loads((lab.path / f"eval{room}/metrics.json").read_text())["evaluated"] == 20
