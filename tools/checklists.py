"""The reporting checklists in `checklists/`: read, checked, their links followed, and written as Markdown."""

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


def flaw(item: dict) -> str | None:
    "What is wrong with an item, or None"
    missing = [key for key in NEEDED if key not in item]
    if missing:
        return f"lacks {', '.join(missing)}"
    if item["status"] not in STATUS:
        return f"has the status {item['status']!r}, which is none of {', '.join(STATUS)}"
    if item["status"] in ("present", "partly") and not item.get("links"):
        return f"is {item['status']}, but links to nothing"
    return None


def read_checklist(path: str | Path) -> dict:
    "A checklist with `name, title, cite, doi, checked, items`; `StudyError` names the item that is wrong"
    found = yaml.safe_load(Path(path).read_text())
    for item in found["items"]:
        wrong = flaw(item)
        if wrong:
            raise StudyError(f"{path}: item {item.get('number')} {wrong}.")
    numbers = [str(item["number"]) for item in found["items"]]
    twice = sorted({n for n in numbers if numbers.count(n) > 1})
    if twice:
        raise StudyError(f"{path}: item {', '.join(twice)} stands there twice.")
    return found


def checklists(folder: Path | None = None) -> dict[str, dict]:
    "All checklists of the project (None finds its folder): short name -> dictionary"
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
    "The identifier that the site gives a heading, as Pandoc makes it"
    kept = re.sub(r"[^\w\s.-]", "", heading.replace("`", "").lower())
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s", "-", kept.strip()))


def exported(module: str, folder: Path) -> tuple[list[str], str]:
    "Exported names of a module such as `evaluate.metrics`, and its notebook below `nbs`; nothing is imported"
    source = (Path(folder) / "cxr_study" / f"{module.replace('.', '/')}.py").read_text()
    names = re.search(r"^__all__ = (\[.*?\])", source, re.M | re.S)
    notebook = re.search(r"File to edit: (?:\.\./)+nbs/(\S+\.ipynb)", source)
    return ast.literal_eval(names[1]), notebook[1]


def _follow_name(link: str, folder: Path) -> tuple[str, str]:
    "(words, page and anchor) of an exported name; `StudyError` if the module does not export it"
    module, _, name = link.rpartition(".")
    names, notebook = exported(module, folder)
    if name not in names:
        raise StudyError(f"cxr_study.{module} does not export {name}.")
    return f"`{link}`", f"{notebook}#{name.lower()}"


def follow(link: str, folder: Path | None = None) -> tuple[str, str]:
    """(words, address) of a link; `StudyError` if what it names is not there.

    A link is a file or folder of the project, with a heading after `#` if it is a notebook or Markdown, or an
    exported name such as `evaluate.metrics.scored`. Addresses of notebooks are relative to `nbs`."""
    folder = Path(folder or root())
    name, _, heading = link.partition("#")
    if not (folder / name).exists():
        module = folder / "cxr_study" / f"{name.rpartition('.')[0].replace('.', '/')}.py"
        if re.fullmatch(r"[a-z_.]+\.\w+", name) and module.exists():
            return _follow_name(name, folder)
        raise StudyError(f"{name} is not there.")
    if heading and heading not in headings(folder / name):
        raise StudyError(f"{name} has no heading {heading!r}.")
    words = f": {heading}" if heading else ""
    place = f"#{anchor(heading)}" if heading else ""
    if name.startswith("nbs/") and name.endswith(".ipynb"):
        return Path(name).stem + words, name.removeprefix("nbs/") + place
    return name + words, REPOSITORY + name + place


def broken(checklist: dict, folder: Path | None = None) -> list[tuple[str, str]]:
    "Links that lead nowhere: (number of the item, what is wrong)"
    found = []
    for item in checklist["items"]:
        for link in item.get("links", []):
            try:
                follow(link, folder)
            except StudyError as error:
                found.append((str(item["number"]), str(error)))
    return found


# --- Pages

SHOWN = {
    "present": "present",
    "partly": "**partly**",
    "absent": "**absent**",
    "not applicable": "not applicable",
}
HEAD = "| | item | status | where, and what is there |\n|---|-----|---|---------|"


def tally(checklist: dict) -> dict[str, int]:
    "Number of items of each status, and of those that apply"
    status = [item["status"] for item in checklist["items"]]
    counts = {s: status.count(s) for s in STATUS}
    return counts | dict(applicable=len(status) - counts["not applicable"])


def _as_link(link: str, page: str, folder: Path | None) -> str:
    words, address = follow(link, folder)
    if not address.startswith("https:"):
        address = os.path.relpath(address, page)
    return f"[{words}]({address})"


def _row(item: dict, page: str, folder: Path | None) -> str:
    where = "; ".join(_as_link(link, page, folder) for link in item.get("links", []))
    return (
        f"| {item['number']} | {item['topic']} | {SHOWN[item['status']]} | {item['says']} {where} |"
    )


def _cited(checklist: dict) -> str:
    c = checklist
    return f"{c['title']}. {c['cite']}, [doi:{c['doi']}](https://doi.org/{c['doi']}). {c['checked'].strip()}"


def _counts(checklist: dict) -> str:
    found = tally(checklist)
    return (
        f"{found['present']} of {found['applicable']} applicable items are present, "
        f"{found['partly']} partly, {found['absent']} absent."
    )


def _section_table(checklist: dict, section: str, page: str, folder: Path | None) -> str:
    rows = [_row(item, page, folder) for item in checklist["items"] if item["section"] == section]
    return f"**{section}**\n\n" + "\n".join([HEAD, *rows])


def rendered(checklist: dict, page: str = "howto", folder: Path | None = None) -> str:
    "A checklist as Markdown for a notebook in the folder `page` below `nbs`: citation, counts, a table for each section"
    sections = dict.fromkeys(item["section"] for item in checklist["items"])
    tables = [_section_table(checklist, name, page, folder) for name in sections]
    return "\n\n".join([_cited(checklist), f"**{_counts(checklist)}**", *tables])
