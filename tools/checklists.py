"""The reporting checklists in `checklists/`: read them, check them and their links, and write them as Markdown."""

import ast
import json
import os
import re
from pathlib import Path

import yaml

from cxr_study.core.run import StudyError, root

STATUS = ("present", "partly", "absent", "not applicable")
NEEDED = ("number", "section", "topic", "status", "says")
REPOSITORY = "https://github.com/cxr-study/cxr_study/blob/main/"


# --- Reading


def flaw(item: dict) -> str | None:
    "What is wrong with an item, or None"
    missing = [key for key in NEEDED if key not in item]
    if missing:
        return f"lacks {', '.join(missing)}"
    status = item["status"]
    if status not in STATUS:
        return f"has the status {status!r}, which is none of {', '.join(STATUS)}"
    if status in ("present", "partly") and not item.get("links"):
        return f"is {status}, but has no link"
    return None


def read_checklist(path: str | Path) -> dict:  # `name, title, cite, doi, checked, items`
    "A checklist; raises `StudyError` with the number of an item that is wrong"
    checklist = yaml.safe_load(Path(path).read_text())
    numbers = []
    for item in checklist["items"]:
        wrong = flaw(item)
        if wrong:
            raise StudyError(f"{path}: item {item.get('number')} {wrong}.")
        numbers.append(str(item["number"]))
    repeated = sorted({n for n in numbers if numbers.count(n) > 1})
    if repeated:
        raise StudyError(f"{path}: item {', '.join(repeated)} occurs twice.")
    return checklist


def checklists(
    folder: Path | None = None,  # None: the project's folder
) -> dict[str, dict]:  # Short name -> checklist
    "All checklists of the project"
    files = sorted((Path(folder or root()) / "checklists").glob("*.yml"))
    return {path.stem: read_checklist(path) for path in files}


# --- Links


def headings(path: str | Path) -> list[str]:
    "The headings of a notebook or a Markdown file, in order, without those in code blocks"
    text = Path(path).read_text()
    if Path(path).suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.findall(r"^#+ (.+?) *$", without_code, re.M)


def anchor(heading: str) -> str:
    "The identifier of a heading on the site, as Pandoc makes it"
    text = heading.replace("`", "").lower()
    letters = re.sub(r"[^\w\s.-]", "", text)
    hyphenated = re.sub(r"\s", "-", letters.strip())
    return re.sub(r"^[^a-z]+", "", hyphenated)


def _module_path(module: str, folder: Path) -> Path:  # Such as 'evaluate.metrics'
    return Path(folder) / "cxr_study" / f"{module.replace('.', '/')}.py"


def exported(
    module: str,  # Such as 'evaluate.metrics'
    folder: Path,  # The project's folder
) -> tuple[list[str], str]:
    "Public names of a module, and its notebook below `nbs`; the module is not imported"
    source = _module_path(module, folder).read_text()
    names = re.search(r"^__all__ = (\[.*?\])", source, re.M | re.S)
    notebook = re.search(r"File to edit: (?:\.\./)+nbs/(\S+\.ipynb)", source)
    return ast.literal_eval(names[1]), notebook[1]


def _follow_name(link: str, folder: Path) -> tuple[str, str]:
    "(text, page and anchor) of a public name; raises `StudyError` if the module does not export it"
    module, _, name = link.rpartition(".")
    names, notebook = exported(module, folder)
    if name not in names:
        raise StudyError(f"cxr_study.{module} does not export {name}.")
    return f"`{link}`", f"{notebook}#{name.lower()}"


def _is_public_name(link: str, folder: Path) -> bool:
    "Whether a link has the form of a name in a module of the library"
    if not re.fullmatch(r"[a-z_.]+\.\w+", link):
        return False
    module, _, _ = link.rpartition(".")
    return _module_path(module, folder).exists()


def follow(link: str, folder: Path | None = None) -> tuple[str, str]:
    """(text, address) of a link; raises `StudyError` if its target does not exist.

    A link is a file or folder of the project, with a heading after `#` if it is a notebook or Markdown, or a
    public name such as `evaluate.metrics.scored`. Addresses of notebooks are relative to `nbs`."""
    folder = Path(folder or root())
    name, _, heading = link.partition("#")
    path = folder / name
    if not path.exists():
        if _is_public_name(name, folder):
            return _follow_name(name, folder)
        raise StudyError(f"{name} does not exist.")
    if heading and heading not in headings(path):
        raise StudyError(f"{name} has no heading {heading!r}.")
    text = f": {heading}" if heading else ""
    place = f"#{anchor(heading)}" if heading else ""
    if name.startswith("nbs/") and path.suffix == ".ipynb":
        return path.stem + text, name.removeprefix("nbs/") + place
    return name + text, REPOSITORY + name + place


def broken(checklist: dict, folder: Path | None = None) -> list[tuple[str, str]]:
    "Links without a target: (number of the item, what is wrong)"
    problems = []
    for item in checklist["items"]:
        for link in item.get("links", []):
            try:
                follow(link, folder)
            except StudyError as error:
                problems.append((str(item["number"]), str(error)))
    return problems


# --- Markdown

HEAD = "| | item | status | where, and what is there |\n|---|-----|---|---------|"


def tally(checklist: dict) -> dict[str, int]:
    "Number of items of each status, and of those that apply"
    statuses = [item["status"] for item in checklist["items"]]
    counts = {status: statuses.count(status) for status in STATUS}
    counts["applicable"] = len(statuses) - counts["not applicable"]
    return counts


def _as_link(link: str, page: str, folder: Path | None) -> str:
    text, address = follow(link, folder)
    if not address.startswith("https:"):
        address = os.path.relpath(address, page)
    return f"[{text}]({address})"


def _word(checklist: dict, status: str) -> str:
    "A status in the words of the checklist, whose `answers` may name them"
    return checklist.get("answers", {}).get(status, status)


def _row(checklist: dict, item: dict, page: str, folder: Path | None) -> str:
    links = [_as_link(link, page, folder) for link in item.get("links", [])]
    evidence = f"{item['says']} {'; '.join(links)}"
    status = _word(checklist, item["status"])
    if item["status"] in ("partly", "absent"):
        status = f"**{status}**"
    return f"| {item['number']} | {item['topic']} | {status} | {evidence} |"


def _citation(checklist: dict) -> str:
    doi = checklist["doi"]
    reference = f"{checklist['title']}. {checklist['cite']}, [doi:{doi}](https://doi.org/{doi})."
    return f"{reference} {checklist['checked'].strip()}"


def _counts(checklist: dict) -> str:
    counts = tally(checklist)
    parts = [f"{_word(checklist, status)}: {counts[status]}" for status in STATUS[:3]]
    return f"Of {counts['applicable']} applicable items, {', '.join(parts)}."


def _section_table(checklist: dict, section: str, page: str, folder: Path | None) -> str:
    items = [item for item in checklist["items"] if item["section"] == section]
    rows = [_row(checklist, item, page, folder) for item in items]
    return f"**{section}**\n\n" + "\n".join([HEAD, *rows])


def rendered(
    checklist: dict,
    page: str = "howto",  # Folder of the notebook that shows it, below `nbs`
    folder: Path | None = None,  # None: the project's folder
) -> str:
    "A checklist as Markdown: citation, counts, and one table per section"
    sections = dict.fromkeys(item["section"] for item in checklist["items"])
    tables = [_section_table(checklist, name, page, folder) for name in sections]
    return "\n\n".join([_citation(checklist), f"**{_counts(checklist)}**", *tables])
