"""Results as a person reads them: tables on the terminal, and the one in the README."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

Result = dict[str, Any]

BEGIN = "<!-- benchmark: begin, written by `python -m benchmarks` -->"
END = "<!-- benchmark: end -->"

_PEERS = ("sql", "pandas", "duckdb", "loop", "floor")
_NAMES = {
    "sql": "SQL",
    "pandas": "pandas",
    "duckdb": "DuckDB",
    "loop": "loop",
    "floor": "COPY alone",
}
_STARTS = {
    "help": "`tutormax --help`",
    "import": "`import tutormax_assets`",
    "definitions": "Dagster's definitions loaded",
    "run": "`tutormax run`, 10 tutors",
}


def table(result: Result) -> Table:
    """One result, a line per stage and per contestant."""
    title = f"{result['case']}: {result['tutors']:,} tutors, {result['sessions']:,} sessions"
    shown = Table(title=f"{title}, reference date {result['date']}", title_justify="left")
    shown.add_column("what")
    for column in ("seconds", "times ours", "peak memory", "answers"):
        shown.add_column(column, justify="right")
    for row in _rows(result):
        shown.add_row(*row)
    return shown


def _rows(result: Result) -> Iterator[Sequence[str]]:
    stages = {n: s for n, s in result["seconds"].items() if n != "peers"}
    for name, seconds in stages.items():
        compared = "1" if name == result["compared"] else ""
        yield f"ours: {name.replace('_', ' ')}", f"{seconds:.3f}", compared, "", ""
    yield "ours", "", "", _mib(result["peak_rss_bytes"]), ""
    for name, seconds in result["seconds"]["peers"].items():
        ratio = result["ratio_to"][name]
        memory = result["peer_peak_rss_bytes"].get(name)
        yield (
            name,
            f"{seconds:.3f}",
            "refused" if ratio is None else f"{ratio:.2f}",
            "" if memory is None else _mib(memory),
            _verdict(result, name),
        )
    for name in result["answers_equal"]:
        if name != "all" and name not in result["seconds"]["peers"]:
            yield name, "", "", "", _verdict(result, name)
    for name in ("dates", "rows_persisted", "tutors_changed", "rows_changed", "rows_written"):
        if name in result:
            yield name.replace("_", " "), f"{result[name]:,}", "", "", ""


def _verdict(result: Result, name: str) -> str:
    differing = result["rows_differing"].get(name)
    if differing is None:
        return ""
    return f"{differing} rows differ" if differing else "equal"


def in_readme(text: str, results: Sequence[Result]) -> str:
    """The README with the table of these results between the markers.

    Raises:
        ValueError: The markers are not there.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"The README has no lines {BEGIN} and {END}; put them where it belongs.")
    return pattern.sub(lambda _: f"{BEGIN}\n{markdown(results)}{END}", text)


def markdown(results: Sequence[Result]) -> str:
    """The table of results, with the machine and what is compared with what."""
    lines = [
        f"| what | ours | {' | '.join(_NAMES.values())} | memory |",
        "|---|" + "---:|" * (len(_NAMES) + 2),
    ]
    for result in sorted(results, key=_position):
        lines += [f"| {' | '.join(cells)} |" for cells in _LINES[result["case"]](result)]
    return "\n".join([*_preface(results), "", *lines, ""])


def _position(result: Result) -> tuple[int, int]:
    return list(_LINES).index(result["case"]), result["tutors"]


def _preface(results: Sequence[Result]) -> Iterator[str]:
    machine = results[0]["machine"]
    dates = sorted({result["measured_on"] for result in results})
    on = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    yield (
        f"Measured {on} on {machine['cores']} cores ({machine['cpu']},"
        f" {machine['memory_bytes'] / 2**30:.0f} GiB) with Python {machine['python']},"
        f" Polars {machine['polars']}, Dagster {machine['dagster']} and PostgreSQL"
        f" {machine['postgres']} on the same machine."
    )


def _daily(result: Result) -> Iterator[list[str]]:
    seconds = result["seconds"]
    yield [
        f"one date, {result['tutors']:,} tutors, {result['sessions']:,} sessions:"
        " read to persisted",
        _seconds(seconds["read_to_persisted"]),
        *_ratios(result),
        _mib(result["peak_rss_bytes"]),
    ]
    yield ["the same, whole process", _seconds(seconds["whole_process"]), *[""] * 6]


def _backfill(result: Result) -> Iterator[list[str]]:
    yield [
        f"{result['dates']} dates, {result['tutors']:,} tutors,"
        f" {result['rows_persisted']:,} rows persisted: whole process",
        _seconds(result["seconds"]["whole_process"]),
        *_ratios(result),
        _mib(result["peak_rss_bytes"]),
    ]


def _again(result: Result) -> Iterator[list[str]]:
    seconds = result["seconds"]
    share = seconds["read_to_persisted"] / seconds["first_read_to_persisted"]
    yield [
        f"one date again, {result['tutors_changed']:,} of {result['tutors']:,} tutors changed:"
        f" {result['rows_written']:,} of {result['rows']:,} rows written,"
        f" {share:.2f} of the first run's time",
        _seconds(seconds["read_to_persisted"]),
        *_ratios(result),
        _mib(result["peak_rss_bytes"]),
    ]


def _start_up(result: Result) -> Iterator[list[str]]:
    for name, what in _STARTS.items():
        memory = _mib(result["peak_rss_bytes"]) if name == "run" else ""
        yield [what, _seconds(result["seconds"][name]), *[""] * len(_PEERS), memory]


_LINES = {"daily": _daily, "backfill": _backfill, "again": _again, "start-up": _start_up}


def _ratios(result: Result) -> list[str]:
    ratios = (result["ratio_to"].get(name) for name in _PEERS)
    return ["" if ratio is None else f"{ratio:,.3g} x" for ratio in ratios]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
