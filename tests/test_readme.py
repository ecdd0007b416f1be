"""The README points at lines; they have to say what it says they say."""

import re

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
