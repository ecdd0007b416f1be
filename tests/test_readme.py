"""The README points at lines; they have to say what it says they say."""

import re
import subprocess
import sys

import memory
from conftest import ROOT

LINK = re.compile(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)")


def test_every_line_the_readme_points_at_is_there():
    links = LINK.findall((ROOT / "README.md").read_text("utf-8"))
    assert len(links) >= 6
    for snippet, file, number in links:
        line = (ROOT / file).read_text("utf-8").splitlines()[int(number) - 1]
        assert snippet in line, f"{file}:{number} is {line.strip()!r}; the README says {snippet!r}"


def test_tables_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text("utf-8")
    tables = (ROOT / "results/ablations/tables.md").read_text("utf-8").split("\n\n")
    quoted = [table for table in tables if table.startswith("|") and table.strip() in readme]
    assert [table.split(" |")[0] for table in quoted] == ["| method, prediction", "| is it better?", "| grid"]


def test_estimates_are_those_of_today(capsys):
    memory.fit()
    assert capsys.readouterr().out in (ROOT / "README.md").read_text("utf-8")


def test_tables_of_speed_are_those_of_the_raw_files(tmp_path):
    """Every table that the script makes of the committed measurements is in the README as it is."""
    subprocess.run([sys.executable, ROOT / "results/speed/draw.py", "--out", tmp_path / "tables.md"], check=True)
    made = (tmp_path / "tables.md").read_text("utf-8")
    assert made == (ROOT / "results/speed/tables.md").read_text("utf-8")
    tables = [table for table in made.split("\n\n") if table.startswith("|")]
    tables += [part.split("\n", 1)[1].strip() for part in made.split("## ")[1:]]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(tables) >= 6
    for table in tables:
        assert table.strip() in readme, table[:200]
