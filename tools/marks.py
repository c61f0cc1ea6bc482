"""The numbers that a text quotes: each carries a mark that names its file and figure, and is written anew from there."""
import json, os, re
from pathlib import Path

from cxr_study.core.run import StudyError, atomic_write, root
from cxr_study.evaluate.evaluation import quote

MARK = re.compile(r"<!--q (?P<file>\S+) (?P<rest>[^>]+?)-->(?P<shown>.*?)<!--/q-->", re.S)
OPTIONS = re.compile(r"( \d| percent| value)*$")

def quoted(figure, options):                # Entry; words such as '4', 'percent', 'value'
    "A figure as a text quotes it"
    digits = next((int(o) for o in options if o.isdigit()), 1 if 'percent' in options else 3)
    if 'value' in options: figure = dict(figure, lower=None, upper=None)
    if 'percent' not in options or figure['value'] is None: return quote(figure, digits)
    scaled = {k: None if figure[k] is None else 100*figure[k] for k in ('value', 'lower', 'upper')}
    return quote(scaled, digits).replace(' (', ' % (') if scaled['lower'] is not None else quote(scaled, digits) + ' %'

def fill(text,                              # Markdown with marks
         folder=None):                      # The project's folder, from which the marks' files are named; None finds it
    "The text with every marked number as its file has it now; `StudyError` names a mark whose file or figure is not there"
    def one(m):
        name = OPTIONS.sub('', m['rest']).strip()
        file = Path(folder or root())/m['file']
        if not file.is_file(): raise StudyError(f"A text quotes {name} of {m['file']}, which is not there.")
        figures = json.loads(file.read_text())['figures']
        if name not in figures: raise StudyError(f"A text quotes {name}, which {m['file']} does not have.")
        return f"<!--q {m['file']} {m['rest']}-->{quoted(figures[name], m['rest'].removeprefix(name).split())}<!--/q-->"
    return MARK.sub(one, text)

def prose(path):                            # A Markdown file or a notebook
    "The text that people read: the file, or a notebook's Markdown cells"
    text = Path(path).read_text()
    if Path(path).suffix != '.ipynb': return text
    return '\n\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')

def stale(paths, folder=None):              # Files to look through; see `fill`
    "Quotes that differ from the file they name: list of (path, as it stands, as it should be)"
    found = []
    for path in paths:
        text = re.sub(r"^(    |\t).*$", '', prose(path), flags=re.M)  # Indented code shows the form of a mark
        found += [(str(path), m[0], now) for m in MARK.finditer(text) if (now := fill(m[0], folder)) != m[0]]
    return found

def unmarked(text):                         # Markdown
    "Numbers such as 0.951 that no mark vouches for"
    text = re.sub(r"```.*?```|`[^`]*`", '', MARK.sub('', text), flags=re.S)
    lines = [line for line in text.splitlines() if '](http' not in line and not line.startswith(('    ', '\t'))]
    return re.findall(r"(?<![\w.])\d?\.\d{3,}(?![\w.])", '\n'.join(lines))
