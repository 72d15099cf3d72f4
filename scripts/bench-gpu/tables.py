"""Tables of the report, and the results that they are made of."""


def short(number: float | None) -> str:
    """Formats a number with at least three significant digits."""
    if number is None:
        return "–"
    for limit, digits in ((100, 0), (10, 1), (1, 2), (0, 3)):
        if abs(number) >= limit:
            return f"{number:,.{digits}f}"
    return str(number)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return ["Not measured.", ""]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


class Results:
    def __init__(self, everything: dict):
        self.all = everything["results"]

    def of(self, step: str) -> list[tuple[str, str, dict]]:
        found = [result for result in self.all if result["step"] == step]
        return [(result["shape"], result["precision"], result["found"]) for result in found]

    def best(self, shape: str, precision: str, graph: str) -> dict | None:
        """Returns the engine's measurement of a graph at its fastest batch size."""
        for own_shape, own_precision, found in self.of("engine"):
            if (own_shape, own_precision) == (shape, precision):
                rows = [row for row in found["findings"]["graphs"] if row["graph"] == graph]
                return max(rows, key=lambda row: row["images_per_second"], default=None)
        return None
