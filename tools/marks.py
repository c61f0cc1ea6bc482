"""The numbers that a text quotes: each carries a mark that names its file and figure.

    python tools/marks.py          writes the numbers of all texts anew from their files

A mark is `<!--q FILE FIGURE [DIGITS] [percent] [value]-->0.951 (0.930 to 0.970)<!--/q-->`."""

import json
import re
from pathlib import Path

from cxr_study.core.run import StudyError, atomic_write, root
from cxr_study.evaluate.evaluation import quote

MARK = re.compile(r"<!--q (?P<file>\S+) (?P<rest>[^>]+?)-->(?P<shown>.*?)<!--/q-->", re.S)
OPTIONS = re.compile(r"( \d| percent| value)*$")


def quoted(figure: dict, options: list[str]) -> str:
    "An entry as a text quotes it; `options` are words such as '4', 'percent', 'value'"
    digits = next((int(o) for o in options if o.isdigit()), 1 if "percent" in options else 3)
    if "value" in options:
        figure = dict(figure, lower=None, upper=None)
    if "percent" not in options or figure["value"] is None:
        return quote(figure, digits)
    scaled = {
        k: None if figure[k] is None else 100 * figure[k] for k in ("value", "lower", "upper")
    }
    text = quote(scaled, digits)
    return f"{text} %" if scaled["lower"] is None else text.replace(" (", " % (")


def fill(text: str, folder: Path | None = None) -> str:
    """The text with every marked number as its file, below `folder`, has it now (None finds the project's folder).

    `StudyError` names a mark whose file or figure is not there."""
    folder = Path(folder or root())

    def one(match):
        name = OPTIONS.sub("", match["rest"]).strip()
        file = folder / match["file"]
        if not file.is_file():
            raise StudyError(f"A text quotes {name} of {match['file']}, which is not there.")
        figures = json.loads(file.read_text())["figures"]
        if name not in figures:
            raise StudyError(f"A text quotes {name}, which {match['file']} does not have.")
        shown = quoted(figures[name], match["rest"].removeprefix(name).split())
        return f"<!--q {match['file']} {match['rest']}-->{shown}<!--/q-->"

    return MARK.sub(one, text)


def prose(path: str | Path) -> str:
    "The text that people read: a Markdown file, or a notebook's Markdown cells"
    text = Path(path).read_text()
    if Path(path).suffix != ".ipynb":
        return text
    return "\n\n".join(
        "".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"
    )


def _without_indented(text):
    "Without indented code, which shows the form of a mark"
    return re.sub(r"^(    |\t).*$", "", text, flags=re.M)


def stale(paths, folder: Path | None = None) -> list[tuple[str, str, str]]:
    "Quotes in these files that differ from the file they name: (path, as it stands, as it should be)"
    found = []
    for path in paths:
        for match in MARK.finditer(_without_indented(prose(path))):
            now = fill(match[0], folder)
            if now != match[0]:
                found.append((str(path), match[0], now))
    return found


def unmarked(text: str) -> list[str]:
    "Numbers such as 0.951 that no mark vouches for"
    text = re.sub(r"```.*?```|`[^`]*`", "", MARK.sub("", text), flags=re.S)
    lines = [line for line in _without_indented(text).splitlines() if "](http" not in line]
    return re.findall(r"(?<![\w.])\d?\.\d{3,}(?![\w.])", "\n".join(lines))


def texts(folder: Path | None = None) -> list[Path]:
    "All texts of the project: its Markdown files at the top, and its notebooks"
    folder = Path(folder or root())
    return sorted([*folder.glob("*.md"), *(folder / "nbs").rglob("*.ipynb")])


def refill(path: Path, folder: Path | None = None) -> None:
    "Write the marks of a file anew; the mark's own form in indented code stays"

    def renewed(text):
        for match in MARK.finditer(_without_indented(text)):
            text = text.replace(match[0], fill(match[0], folder))
        return text

    if path.suffix != ".ipynb":
        text = renewed(path.read_text())
    else:
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = renewed("".join(cell["source"])).splitlines(keepends=True)
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    with atomic_write(path) as file:
        file.write_text(text)


if __name__ == "__main__":
    for changed in sorted({path for path, _, _ in stale(texts())}):
        refill(Path(changed))
        print(f"written anew: {changed}")
