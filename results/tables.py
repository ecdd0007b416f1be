"""What the scripts that redraw tables and figures have in common."""

OOD = "test_ood"
MAIN = ("test", "valid", "unseen_answers")  # the first test of a task


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def filled_table(head: list[str], rows: list[list]) -> str:
    """Return a table without the columns that are empty in every row."""
    filled = [i for i in range(len(head)) if any(row[i] for row in rows)]
    head, *rows = ([row[i] for i in filled] for row in (head, *rows))
    return table(head, rows)


class Cells:
    """Hold the cells of metrics.json by (row, test, reading); one that was not run leaves its place empty.

    test: which one `find` takes, and on others' CoTs the names of the tests begin with `diagnosed`.
    """

    def __init__(self, cells: list[dict], test: str | None = None):
        self.cells = {(c["row"], c["test"], c["reading"]): c for c in cells}
        main = next(c["test"] for c in cells if c["test"] in MAIN)
        self.test = test or main
        self.diagnosed = "" if self.test == main else f"{self.test}-"

    def find(self, row: str, reading: str = "rail", test: str | None = None) -> dict | None:
        return self.cells.get((row, test or self.test, reading))

    def mean(self, row: str, metric: str, reading: str = "rail", test: str | None = None) -> str:
        cell = self.find(row, reading, test)
        if cell is None:
            return ""
        spread = "" if cell[metric]["sd"] is None else f" ± {cell[metric]['sd']:.3f}"
        return f"{cell[metric]['mean']:.3f}{spread}"

    def difference(self, row: str, metric: str, reading: str = "rail", test: str | None = None) -> str:
        cell = self.find(row, reading, test) or {}
        return interval(cell["difference"][metric]) if "difference" in cell else ""

    def reliability(self, row: str, reading: str = "rail", test: str | None = None) -> list[str]:
        """Return log score and calibration error; nothing for decoded scores, which are no distribution."""
        if reading == "decoded":
            return ["", ""]
        return [self.mean(row, metric, reading, test) for metric in ("log_score", "calibration_error")]


def interval(entry: dict) -> str:
    return "" if entry["value"] is None else "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**entry)


def whose_cots(cells: Cells) -> str:
    """Return the RMSE of p_s and p_tract on whose CoTs."""
    rows = []
    for name, row, test_on_p_s, paper in (
        ("p_s", "a1", cells.test, ".12 → .63"),
        ("p_tract", "tract", f"{cells.diagnosed}p_s", ".45 → .45"),
    ):
        annotated = f"{cells.diagnosed}annotated"
        means = [cells.mean(row, "rmse", test=test) for test in (annotated, test_on_p_s, cells.test)]
        rows.append([name, *means, paper])
    head = ["RMSE of", "on annotated CoTs", "on the CoTs of p_s", "on its own CoTs"]
    return table([*head, "paper, training → own CoTs"], rows)


def bar(axis, y: int, values: dict, color: str) -> None:
    """Draw a mean as a bar, with a dot a seed."""
    axis.barh(y, values["mean"], color=color, alpha=0.35)
    axis.plot(values["per_seed"], [y] * len(values["per_seed"]), ".", color="black", markersize=4)
