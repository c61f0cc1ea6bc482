"""The reporting checklists: complete, and every link leads to what it promises."""
import re
import pytest
from conftest import ROOT
from checklists import broken, checklists, follow, tally
from cxr_study.core.run import StudyError

EVERY = checklists(ROOT)


@pytest.mark.parametrize("name", EVERY)
def test_every_link_leads_somewhere(name):
    assert broken(EVERY[name], ROOT) == []


def test_every_item_is_there():
    numbers = {name: [str(i["number"]) for i in c["items"]] for name, c in EVERY.items()}
    assert numbers["claim"] == [str(n) for n in range(1, 45)]
    assert len(numbers["tripod"]) == 52 and {int(re.match(r"\d+", n)[0]) for n in numbers["tripod"]} == set(range(1, 28))
    assert len(numbers["stard"]) == 48 and {int(re.match(r"\d+", n)[0]) for n in numbers["stard"]} == set(range(1, 41))


def test_counts():
    assert tally(EVERY["claim"])["present"] >= 36
    for c in EVERY.values(): assert tally(c)["present"] >= .7 * tally(c)["applicable"]


def test_critical_items_are_present():
    "Reference standard, disjointness, uncertainty, limitations"
    status = {i["number"]: i["status"] for i in EVERY["claim"]["items"]}
    assert {n: status[n] for n in (14, 20, 29, 40)} == dict.fromkeys((14, 20, 29, 40), "present")


def test_what_cannot_be_known_is_said():
    demographics = {name: next(i for i in EVERY[name]["items"] if str(i["number"]) == n) for name, n in dict(claim="36", stard="25", tripod="20b").items()}
    for item in demographics.values():
        assert item["status"] == "partly" and re.search(r"age", item["says"], re.I) and "sex" in item["says"] and "not released" in item["says"]


def test_a_link_that_leads_nowhere_is_found():
    for link in ("nbs/nowhere.ipynb", "nbs/00_core.ipynb#No such heading", "core.nothing", "results/nothing/metrics.json"):
        with pytest.raises(StudyError): follow(link, ROOT)


def test_the_pages_show_the_files_of_today():
    "The committed notebook was run after the last change of the checklists"
    page = (ROOT/"nbs/12_checklists.ipynb").read_text()
    for c in EVERY.values(): assert f"{tally(c)['present']} of {tally(c)['applicable']} applicable items are present" in page
