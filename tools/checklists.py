"""The reporting checklists in `checklists/`: read, checked, their links followed, and written as Markdown."""
import ast, json, re
from pathlib import Path

import yaml

from cxr_study.core.run import StudyError, root

STATUS = ('present', 'partly', 'absent', 'not applicable')

def flaw(item):
    "What is wrong with an item, or None"
    if missing := [k for k in ('number', 'section', 'topic', 'status', 'says') if k not in item]: return f"lacks {', '.join(missing)}"
    if item['status'] not in STATUS: return f"has the status {item['status']!r}, which is none of {', '.join(STATUS)}"
    if item['status'] in ('present', 'partly') and not item.get('links'): return f"is {item['status']}, but links to nothing"

def read_checklist(path):
    "A checklist as a dictionary with `name, title, cite, doi, checked, items`; `StudyError` names the item that is wrong"
    found = yaml.safe_load(Path(path).read_text())
    for item in found['items']:
        if wrong := flaw(item): raise StudyError(f"{path}: item {item.get('number')} {wrong}.")
    numbers = [str(i['number']) for i in found['items']]
    if twice := {n for n in numbers if numbers.count(n) > 1}: raise StudyError(f"{path}: item {', '.join(sorted(twice))} stands there twice.")
    return found

def checklists(folder=None):                # The project's folder; None finds it
    "All checklists of the project: short name -> dictionary"
    return {p.stem: read_checklist(p) for p in sorted((Path(folder or root())/'checklists').glob('*.yml'))}

def headings(path):                         # A notebook or a Markdown file
    "The headings of a text, in order"
    text = Path(path).read_text()
    if Path(path).suffix == '.ipynb': text = '\n\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
    return re.findall(r"^#+ (.+?) *$", re.sub(r"^```.*?^```", '', text, flags=re.M | re.S), re.M)

def exported(module, folder):               # Name such as `evaluation`; the project's folder
    "(exported names of a module, the notebook it was made from); nothing is imported"
    source = (Path(folder)/'cxr_study'/f'{module}.py').read_text()
    names = re.search(r"^__all__ = (\[.*?\])", source, re.M | re.S)
    return ast.literal_eval(names[1]), re.search(r"File to edit: \.\./nbs/(\S+\.ipynb)", source)[1]

def anchor(heading):
    "The identifier that the site gives a heading"
    kept = re.sub(r"[^\w\s.-]", '', heading.replace('`', '').lower())
    return re.sub(r"^[^a-z]+", '', re.sub(r"\s", '-', kept.strip()))

REPOSITORY = "https://github.com/cxr-study/cxr_study/blob/main/"

def follow_name(link, folder):              # Such as `evaluation.scored`
    "(words, address) of an exported name; `StudyError` if the module does not export it"
    module, name = link.split('.')
    names, notebook = exported(module, folder)
    if name not in names: raise StudyError(f"cxr_study.{module} does not export {name}.")
    return f"`{link}`", f"{notebook}#{name.lower()}"

def follow(link, folder=None):              # See above; the project's folder, None finds it
    "(words, address) of a link; `StudyError` if what it names is not there"
    folder = Path(folder or root())
    name, _, heading = link.partition('#')
    words, place = (f": {heading}", f"#{anchor(heading)}") if heading else ('', '')
    if (folder/name).exists():
        if heading and heading not in headings(folder/name): raise StudyError(f"{name} has no heading {heading!r}.")
        return (Path(name).stem + words, Path(name).name + place) if name.endswith('.ipynb') else (name + words, REPOSITORY + name + place)
    if re.fullmatch(r"[a-z_]+\.\w+", name) and (folder/'cxr_study'/f"{name.split('.')[0]}.py").exists(): return follow_name(name, folder)
    raise StudyError(f"{name} is not there.")

def broken(checklist, folder=None):
    "Links that lead nowhere: list of (number, what is wrong)"
    found = []
    for item in checklist['items']:
        for link in item.get('links', []):
            try: follow(link, folder)
            except StudyError as e: found.append((str(item['number']), str(e)))
    return found

def tally(checklist):
    "Number of items of each status, and of those that apply"
    status = [i['status'] for i in checklist['items']]
    return {s: status.count(s) for s in STATUS} | dict(applicable=len(status) - status.count('not applicable'))

MARKS = {'present': "present", 'partly': "**partly**", 'absent': "**absent**", 'not applicable': "not applicable"}

def as_link(link, folder=None):
    "A link as Markdown"
    try: words, address = follow(link, folder)
    except StudyError: return f"{link} (missing)"
    return f"[{words}]({address})"

def line(item, folder=None):
    "An item as a row of the table"
    where = '; '.join(as_link(link, folder) for link in item.get('links', []))
    return f"| {item['number']} | {item['topic']} | {MARKS[item['status']]} | {item['says']} {where} |"

HEAD = "| | item | status | where, and what is there |\n|---|-----|---|---------|"

def cited(c): return f"{c['title']}. {c['cite']}, [doi:{c['doi']}](https://doi.org/{c['doi']}). {c['checked'].strip()}"

def section_table(checklist, section, folder=None):
    "The items of a section as a Markdown table below its name"
    return f"**{section}**\n\n" + '\n'.join([HEAD, *(line(i, folder) for i in checklist['items'] if i['section'] == section)])

def rendered(checklist, folder=None):
    "A checklist as Markdown: citation, counts, and a table for each section"
    found, sections = tally(checklist), dict.fromkeys(i['section'] for i in checklist['items'])
    counts = f"{found['present']} of {found['applicable']} applicable items are present, {found['partly']} partly, {found['absent']} absent."
    return '\n\n'.join([cited(checklist), f"**{counts}**", *(section_table(checklist, name, folder) for name in sections)])
