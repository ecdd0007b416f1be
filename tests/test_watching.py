"""What a training shows and leaves for people: lines on the screen, curves, a model card."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from huggingface_hub import ModelCard

from tract import curves, hub, training
from tract.card import card

pytestmark = pytest.mark.pictures
PNG = b"\x89PNG\r\n"
ODD = "a: 'b' \"c\" {d} # é\n---\n- 日本"
RUN = {
    "arguments": {
        "stage": 1,
        "grid": "1=0,5=100",
        "suffix": f" {ODD} ",
        "model": f"/home/me/{ODD}",
        "lora": None,
    }
    | {"data": f"/home/me/{ODD}.jsonl", "no_cot": False, "ce_weight": 1.0, "lam": 0.5, "penalty": "squared"}
    | {"score_ce": "token", "score_weight": None, "four_bit": True},
    "inputs": {"data": "147f"},
    "last_step": {"valid": {"n": 3, "ce": 0.25, "rmse": 1.5}},
}


def line(step: int, loss: float | None, **more) -> dict:
    """Make a line of log.jsonl of a step that was taken, if it has a loss."""
    numbers = dict.fromkeys(("loss", "ce", "penalty", "grad_norm"), loss)
    return {"step": step, "taken": loss is not None, "lr": step / 1000} | numbers | more


def test_a_training_says_how_it_does_and_leaves_a_picture_and_a_card(lab):
    data, valid = lab.write("my data.jsonl", lab.rows[:32]), lab.write("v.jsonl", lab.rows[32:40])
    options = ("--data", data, "--valid", valid, "--epochs", 2, "--suffix", "So overall :\n")
    lab.run("stage1_train", *options, "--out", lab.path / "out")
    said = lab.capsys.readouterr().out
    held_out = [step["valid"] for step in lab.read("out/log.jsonl") if "valid" in step]
    assert len(held_out) == 2
    for epoch, values in enumerate(held_out, 1):
        shown = f"CE {values['ce']:.3f} a token, RMSE {values['rmse']:.3f}\n"
        assert f"\nepoch {epoch}: held out, on the CoTs given: {shown}" in said
    assert (lab.path / "out/curves.png").read_bytes().startswith(PNG)
    page = ModelCard.load(lab.path / "out/README.md")
    trained = hub.training_arguments(str(lab.path / "out"))
    assert (page.data["grid"], page.data["suffix"]) == (trained["grid"], trained["suffix"])
    assert page.data.library_name == "transformers" and page.data.base_model is None
    assert "'my data.jsonl', SHA-256 " + hub.sha256(data) in page.text and str(lab.path) not in page.content
    assert f"RMSE {held_out[-1]['rmse']:.3f}." in page.text and "base model   'seed'" in page.text
    # What people write into the folder makes no other model of it
    before = hub.identity(str(lab.path / "out"))
    (lab.path / "out/README.md").write_text("mine")
    (lab.path / "out/curves.png").unlink()
    assert hub.identity(str(lab.path / "out")) == before


def test_a_training_ends_well_without_picture_and_card(lab, monkeypatch):
    def half(out):
        out.write(PNG)
        raise ValueError("no font\nat all")

    monkeypatch.setattr(curves, "draw", lambda logs: SimpleNamespace(savefig=half))
    monkeypatch.setattr(training, "card", lambda run: run["nothing"])
    lab.run(
        "stage1_train",
        "--data",
        lab.write("t.jsonl", lab.rows[:16]),
        "--epochs",
        1,
        "--out",
        lab.path / "out",
    )
    said = lab.capsys.readouterr().out
    assert (
        "out: without curves.png (no font at all)\n" in said and "out: without README.md ('nothing')" in said
    )
    names = {path.name for path in (lab.path / "out").iterdir()}
    assert "run.json" in names and not {name for name in names if "curves" in name or "README" in name}


def test_curves_leave_out_steps_not_taken_and_mark_them():
    losses = [8.0, None, 4.0, 2.0, 1.0]
    log = [line(step, loss) for step, loss in enumerate(losses, 1)]
    log[-1]["valid"] = {"n": 2, "ce": 0.1, "rmse": 0.7}
    long_log = [line(step, float(step)) for step in range(1, 101)]
    loss, _, _, rmse, lr = curves.draw({"short": log, "$x$_long": long_log}).axes
    thin, thick, _, means = loss.lines
    assert thin.get_xydata().tolist() == thick.get_xydata().tolist() == [[1, 8], [3, 4], [4, 2], [5, 1]]
    assert loss.collections[0].get_segments()[0].tolist() == [[2, 0], [2, 1]]
    # Of 100 steps the thick line is the mean of three at a time, drawn at the last of them
    assert means.get_xydata()[0].tolist() == pytest.approx([3, 2]) and len(means.get_xydata()) == 98
    assert rmse.lines[0].get_xydata().tolist() == [[5, 0.7]] and len(lr.lines[0].get_xydata()) == 5
    without = curves.draw({"": long_log}).axes
    assert [axis.get_title() for axis in without] == ["loss", "CE", "penalty", "learning rate"]
    only_bad = curves.draw({"_a$b$c^{": [line(1, None)], "日本\udc80": log})
    with pytest.warns(UserWarning, match="Glyph"):
        only_bad.savefig(io.BytesIO())


def test_runs_ended_and_under_way_in_one_picture(lab):
    for folder in ("ended", "on.part", "empty", "other", "list", "stepless"):
        (lab.path / folder).mkdir()
    lab.write("ended/log.jsonl", [line(1, 2.0)])
    lab.write("empty/log.jsonl", [])
    lab.write("other/log.jsonl", [{"step": 1, "taken": True}])
    lab.write("list/log.jsonl", [[1]])
    lab.write("stepless/log.jsonl", [{"taken": True, "lr": 1}])
    under_way = lab.write("on.part/log.jsonl", [line(1, 3.0), line(2, 2.0)])
    with open(under_way, "a") as log:
        log.write('{"step": 3, "ta')
    assert [step["step"] for step in curves.read_log(lab.path / "on")] == [1, 2]
    both = lab.path / "both.png"
    lab.run("tract.curves", lab.path / "ended", lab.path / "on", "--out", both)
    assert both.read_bytes().startswith(PNG)
    assert "both.png: is there already" in lab.fail("tract.curves", lab.path / "on", "--out", both)[1]
    for name, message in {
        "empty": "has no step yet",
        "other": "no training wrote it",
        "list": "no training wrote it",
        "stepless": "no training wrote it",
        "none": "no log.js",
    }.items():
        code, said = lab.fail("tract.curves", lab.path / name, "--out", lab.path / "x.png")
        assert code == 2 and message in said and len(said.splitlines()) == 1


def test_a_card_holds_any_name_and_no_path(tmp_path):
    for base, name in (({}, None), ({"model name": f"me/{ODD}", "model revision": "1"}, f"me/{ODD}")):
        text = card(RUN | {"inputs": RUN["inputs"] | base})
        (tmp_path / "README.md").write_text(text, "utf-8")
        page = ModelCard.load(tmp_path / "README.md")
        assert page.data.to_dict()["suffix"] == f" {ODD} " and page.data["grid"] == "1=0,5=100"
        assert page.data.base_model == name and "/home/me" not in text
        assert page.text.lstrip().startswith("# A judge") and f"suffix       {f' {ODD} '!r}\n" in page.text
        assert "1.0 · CE + 0.5 · penalty (squared)" in page.text and "On 3 held-out records" in page.text
    lora = {"lora": 8, "stage": 2, "no_cot": True, "model": "m\udc80", "data": "/x/d\udc80.jsonl"}
    text = card({"arguments": RUN["arguments"] | lora, "inputs": RUN["inputs"], "last_step": {}})
    assert text.encode() and "an adapter of rank 8" in text and "library_name: peft" in text
    assert "judged.jsonl --no-cot" in text and "No records were held out" in text


def test_the_page_sends_a_log_to_trackio(lab, monkeypatch):
    """Run the page's lines with a stand-in that notes what it is given."""
    page = (ROOT / "docs/watching.md").read_text("utf-8")
    (snippet,) = re.findall(r"\n\n((?:    .*\n|\n)*?    import trackio\n(?:    .*\n|\n)*)", page)
    noted = []
    trackio = SimpleNamespace(init=lambda **run: None, finish=lambda: noted.append("finished"))
    trackio.log = lambda values, step: noted.append((step, values))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.chdir(lab.path)
    (lab.path / "out/run/stage1").mkdir(parents=True)
    held_out = {"valid": {"n": 2, "ce": 0.1, "rmse": 0.7}}
    lab.write("out/run/stage1/log.jsonl", [line(1, 2.0), line(2, None, **held_out)])
    exec("".join(text[4:] or "\n" for text in snippet.splitlines(keepends=True)), {})
    assert [entry if entry == "finished" else entry[0] for entry in noted] == [1, 2, "finished"]
    assert noted[0][1]["loss"] == 2.0 and noted[1][1]["valid/rmse"] == 0.7 and "valid" not in noted[1][1]
