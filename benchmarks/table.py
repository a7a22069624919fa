"""The markdown tables of docs/performance.md, from the lines that benchmarks print.

    python benchmarks/X.py ... | tee -a lines.jsonl
    python benchmarks/table.py < lines.jsonl

One table for each benchmark, machine and date. What is the same in all its lines stands above it.
"""

from __future__ import annotations

import json
import sys

import measure
from measure import InputError

ABOUT = ("machine", "versions", "date")


def tables(lines: list[dict]) -> str:
    """The tables of some lines, in the order of their first lines."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault(tuple(line[key] for key in ("benchmark", *ABOUT)), []).append(line)
    return "\n\n".join(_table(*about, rows) for about, rows in groups.items())


def _table(benchmark: str, machine: str, versions: str, date: str, lines: list[dict]) -> str:
    keys = list(dict.fromkeys(key for line in lines for key in line))
    keys = [key for key in keys if key not in ("benchmark", *ABOUT)]
    same = [k for k in keys if len(lines) > 1 and len({json.dumps(x.get(k)) for x in lines}) == 1]
    columns = [key for key in keys if key not in same]
    heading = f"**{benchmark}**: {machine}; {versions}; {date}"
    settled = ", ".join(f"{_words(key)} {_text(key, lines[0][key])}" for key in same)
    rows = [[_words(key) for key in columns], ["---"] * len(columns)]
    rows += [[_text(key, line.get(key)) for key in columns] for line in lines]
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{heading}\n{settled}\n\n{body}" if settled else f"{heading}\n\n{body}"


def _words(key: str) -> str:
    """The key as a heading; seconds, which _text may write as ms, are a time."""
    words = key.replace("_", " ")
    return words.removesuffix("seconds") + "time" if key.endswith("seconds") else words


def _text(key: str, value) -> str:
    """A value as people read it: times and bytes with their units, shares in percent."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{_words(name)} {_text(name, part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(_text(key, part) for part in value)
    if isinstance(value, str | bool):
        return {True: "yes", False: "no"}.get(value, str(value))
    if key.endswith("seconds"):
        return f"{value:.4g} s" if value >= 1 else f"{value * 1e3:.4g} ms"
    if key.endswith("bytes"):
        return _bytes(value)
    if key.startswith("of_"):
        return f"{value:.1%}"
    return f"{value:,}" if abs(value) >= 10_000 else str(value)


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:g} B"


def read(file) -> list[dict]:
    """The benchmarks' lines among the lines of a file.

    Raises:
      InputError: naming the first line that is not one.
    """
    lines = []
    for number, text in enumerate(file, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not {"benchmark", *ABOUT} <= line.keys():
            raise InputError(f"line {number} is not a benchmark's JSON: {text.strip()[:80]!r}")
        lines.append(line)
    if not lines:
        raise InputError("no lines on standard input: pipe what a benchmark prints into it")
    return lines


def main(argv: list[str] | None = None) -> None:
    measure.parser(__doc__).parse_args(argv)
    print(tables(read(sys.stdin)))


if __name__ == "__main__":
    measure.run(main)
