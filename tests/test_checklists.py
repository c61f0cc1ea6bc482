"""The reporting checklists: complete, and every link leads to what it promises."""

import re

import nbformat
import pytest
import yaml
from conftest import ROOT

from checklists import (
    anchor,
    broken,
    checklists,
    flaw,
    follow,
    headings,
    read_checklist,
    rendered,
    tally,
)
from cxr_study.core.run import StudyError

EVERY = checklists(ROOT)


@pytest.mark.parametrize("name", EVERY)
def test_every_link_leads_somewhere(name):
    assert broken(EVERY[name], ROOT) == []


def test_every_item_is_there():
    numbers = {name: [str(i["number"]) for i in c["items"]] for name, c in EVERY.items()}
    assert numbers["claim"] == [str(n) for n in range(1, 45)]
    assert len(numbers["tripod"]) == 52 and {
        int(re.match(r"\d+", n)[0]) for n in numbers["tripod"]
    } == set(range(1, 28))
    assert len(numbers["stard"]) == 48 and {
        int(re.match(r"\d+", n)[0]) for n in numbers["stard"]
    } == set(range(1, 41))
    assert numbers["tripod_code"] == [str(n) for n in range(1, 15)]
    questions = dict(D=(3, 4, 4, 5), E=(3, 4, 4, 7))  # Of PROBAST+AI, in each domain of both parts
    assert numbers["probast"] == [
        f"{part}{domain}.{question}"
        for part, domains in questions.items()
        for domain, n in enumerate(domains, 1)
        for question in range(1, n + 1)
    ]


def test_counts():
    assert tally(EVERY["claim"])["present"] >= 36
    for name in set(EVERY) - {"probast"}:  # Which says how good the study is, not what it reports
        assert tally(EVERY[name])["present"] >= 0.7 * tally(EVERY[name])["applicable"]


def test_an_appraisal_says_no_where_the_label_was_read_from_the_film():
    status = {i["number"]: i["status"] for i in EVERY["probast"]["items"]}
    assert status["D3.3"] == status["E3.3"] == "absent"
    text = rendered(EVERY["probast"], "howto", ROOT)
    assert "| **no** |" in text and "| yes |" in text and "absent" not in text


def test_critical_items_are_present():
    "Reference standard, disjointness, uncertainty, limitations"
    status = {i["number"]: i["status"] for i in EVERY["claim"]["items"]}
    assert {n: status[n] for n in (14, 20, 29, 40)} == dict.fromkeys((14, 20, 29, 40), "present")


def test_what_cannot_be_known_is_said():
    demographics = {
        name: next(i for i in EVERY[name]["items"] if str(i["number"]) == n)
        for name, n in dict(claim="36", stard="25", tripod="20b").items()
    }
    for item in demographics.values():
        assert (
            item["status"] == "partly"
            and re.search(r"age", item["says"], re.I)
            and "sex" in item["says"]
            and "not released" in item["says"]
        )


GOOD = dict(
    number=1,
    section="Title",
    topic="A title",
    status="present",
    links=["README.md"],
    says="It has one.",
)


def test_an_item_that_is_wrong_is_named(tmp_path):
    flaws = [flaw(GOOD), flaw(GOOD | dict(links=[])), flaw(dict(number=1, status="absent"))]
    assert flaws == [None, "is present, but has no link", "lacks section, topic, says"]
    for items, words in (
        ([GOOD | dict(status="yes")], "item 1 has the status 'yes'"),
        ([GOOD, GOOD], "item 1 occurs twice"),
    ):
        (tmp_path / "x.yml").write_text(yaml.safe_dump(dict(items=items)))
        with pytest.raises(StudyError, match=words):
            read_checklist(tmp_path / "x.yml")


def test_links_lead_to_pages_headings_names_and_files():
    assert follow("nbs/lib/evaluate/02_intervals.ipynb#Resampling patients", ROOT) == (
        "02_intervals: Resampling patients",
        "lib/evaluate/02_intervals.ipynb#resampling-patients",
    )
    assert follow("evaluate.metrics.scored", ROOT) == (
        "`evaluate.metrics.scored`",
        "lib/evaluate/01_metrics.ipynb#scored",
    )
    assert follow("LICENSE", ROOT)[1].startswith("https://github.com/")
    assert [anchor("Is it the label?"), anchor("ONNX, and `None`"), anchor("07 First")] == [
        "is-it-the-label",
        "onnx-and-none",
        "first",
    ]
    assert "The one rule" in headings(ROOT / "CONTRIBUTING.md")


@pytest.mark.parametrize(
    "link",
    [
        "nbs/nowhere.ipynb",
        "nbs/lib/core/01_run.ipynb#No such heading",
        "core.run.nothing",
        "core.nothing.Run",
        "results/nothing/metrics.json",
    ],
)
def test_a_link_that_leads_nowhere_is_found(link):
    with pytest.raises(StudyError):
        follow(link, ROOT)
    assert (
        broken(dict(items=[GOOD, GOOD | dict(number=2, links=["LICENSE", link])]), ROOT)[0][0]
        == "2"
    )


def test_the_pages_show_the_files_of_today():
    "The committed notebook was run after the last change of the checklists"
    cells = nbformat.read(ROOT / "nbs/howto/checklists.ipynb", 4).cells
    shown = [
        o.data["text/markdown"]
        for c in cells
        if c.cell_type == "code"
        for o in c.outputs
        if "text/markdown" in o.get("data", {})
    ]
    assert sorted(shown) == sorted(rendered(c, "howto", ROOT) for c in EVERY.values())
    assert shown[0].count("\n| ") - shown[0].count("\n| | item") == 44
