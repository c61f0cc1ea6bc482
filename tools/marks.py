"""The numbers that a text quotes. Each has a mark that names its file and its entry there.

    python tools/marks.py          updates the numbers of all texts from their files

A mark is `<!--q FILE ENTRY [DIGITS] [percent] [value]-->0.951 (0.930 to 0.970)<!--/q-->`. An entry is a name in the
file's `figures`; of a file without figures, such as a benchmark, it is a path: `sizes/2/wall_s`."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from cxr_study.core.run import StudyError, atomic_write, root
from cxr_study.evaluate.evaluation import quote

MARK = re.compile(r"<!--q (?P<file>\S+) (?P<rest>[^>]+?)-->(?P<shown>.*?)<!--/q-->", re.S)
OPTIONS = re.compile(r"( \d| percent| value)*$")


# --- Writing a mark


def _digits(options: list[str]) -> int:
    "Digits to show: as the options say, otherwise 1 for percent and 3 for other numbers"
    for option in options:
        if option.isdigit():
            return int(option)
    return 1 if "percent" in options else 3


def quoted(
    entry: dict,  # Of a file such as `metrics.json`
    options: list[str],  # Such as '4', 'percent', 'value'
) -> str:
    "An entry as a text quotes it"
    digits = _digits(options)
    if "value" in options:
        entry = entry | dict(lower=None, upper=None)
    if "percent" not in options or entry["value"] is None:
        return quote(entry, digits)
    values = {k: entry[k] for k in ("value", "lower", "upper")}
    scaled = {k: None if v is None else 100 * v for k, v in values.items()}
    text = quote(scaled, digits)
    if scaled["lower"] is None:
        return f"{text} %"
    return text.replace(" (", " % (")


def _entry(document: dict, name: str) -> dict | None:
    "An entry of `figures`, or the number at a path such as `servers/cxr_study/load/per_second`; None if it is missing"
    if "figures" in document:
        return document["figures"].get(name)
    value = document
    for step in name.split("/"):
        if isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            return None
    return {"value": value, "lower": None, "upper": None}


def _renewed_mark(match: re.Match, folder: Path) -> str:
    "A mark with the number that its file has now; raises `StudyError` if file or entry is missing"
    name = OPTIONS.sub("", match["rest"]).strip()
    file = folder / match["file"]
    if not file.is_file():
        raise StudyError(f"A text quotes {name} of {match['file']}, but there is no such file.")
    entry = _entry(json.loads(file.read_text()), name)
    if entry is None:
        raise StudyError(f"A text quotes {name}, which {match['file']} does not have.")
    options = match["rest"].removeprefix(name).split()
    return f"<!--q {match['file']} {match['rest']}-->{quoted(entry, options)}<!--/q-->"


def fill(
    text: str,
    folder: Path | None = None,  # Where the files are; None: the project's folder
) -> str:
    "The text with every marked number as its file has it now; raises `StudyError` if file or entry is missing"
    folder = Path(folder or root())
    return MARK.sub(lambda match: _renewed_mark(match, folder), text)


# --- Reading texts


def _markdown_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]


def prose(path: str | Path) -> str:
    "The text of a Markdown file, or of a notebook's Markdown cells"
    text = Path(path).read_text()
    if Path(path).suffix != ".ipynb":
        return text
    cells = _markdown_cells(json.loads(text))
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def _without_indented(text: str) -> str:
    "The text without indented code, which may show the form of a mark"
    return re.sub(r"^(    |\t).*$", "", text, flags=re.M)


def texts(folder: Path | None = None) -> list[Path]:
    "All texts of the project: the Markdown files at its top, and the notebooks"
    folder = Path(folder or root())
    return sorted([*folder.glob("*.md"), *(folder / "nbs").rglob("*.ipynb")])


# --- Checking and updating


def stale(
    paths: Iterable[str | Path],
    folder: Path | None = None,  # Where the files are; None: the project's folder
) -> list[tuple[str, str, str]]:  # (path, mark in the text, mark as it should be)
    "Marks that differ from the file that they name"
    found = []
    for path in paths:
        for match in MARK.finditer(_without_indented(prose(path))):
            now = fill(match[0], folder)
            if now != match[0]:
                found.append((str(path), match[0], now))
    return found


def unmarked(text: str) -> list[str]:
    "Numbers such as 0.951 without a mark, outside code and links"
    without_marks = MARK.sub("", text)
    without_code = re.sub(r"```.*?```|`[^`]*`", "", without_marks, flags=re.S)
    lines = _without_indented(without_code).splitlines()
    without_links = [line for line in lines if "](http" not in line]
    return re.findall(r"(?<![\w.])\d?\.\d{3,}(?![\w.])", "\n".join(without_links))


def _renewed(text: str, folder: Path | None) -> str:
    "A text with all marks updated, except in indented code"
    for match in MARK.finditer(_without_indented(text)):
        text = text.replace(match[0], fill(match[0], folder))
    return text


def refill(path: Path, folder: Path | None = None) -> None:
    "Update the marks of a file"
    text = path.read_text()
    if path.suffix == ".ipynb":
        notebook = json.loads(text)
        for cell in _markdown_cells(notebook):
            source = _renewed("".join(cell["source"]), folder)
            cell["source"] = source.splitlines(keepends=True)
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    else:
        text = _renewed(text, folder)
    with atomic_write(path) as file:
        file.write_text(text)


def main() -> None:
    changed = {path for path, _, _ in stale(texts())}
    for path in sorted(changed):
        refill(Path(path))
        print(f"updated: {path}")


if __name__ == "__main__":
    main()
