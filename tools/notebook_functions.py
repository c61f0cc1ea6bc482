"""The functions that a study notebook defines, for tests and benchmarks: these notebooks export nothing."""

import ast
import functools
import json
import re
import sys
import types
from pathlib import Path

NBS = Path(__file__).parent.parent / "nbs"


def _is_definition(statement):
    "Whether a statement imports, defines a function or class, or sets a constant in capitals"
    if isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
        return True
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return bool(names) and all(name.isupper() for name in names)


@functools.cache
def functions_of(name):
    "Module with the imports, functions and constants of `nbs/<name>.ipynb`; no other cell is executed"
    module = types.ModuleType(name.replace("/", "."))
    sys.modules[module.__name__] = module  # dataclasses and timm look there
    cells = json.loads((NBS / f"{name}.ipynb").read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        source = re.sub(r"^\s*[%!].*$", "", "".join(cell["source"]), flags=re.M)
        statements = [s for s in ast.parse(source).body if _is_definition(s)]
        exec(compile(ast.Module(statements, []), name, "exec"), module.__dict__)
    return module
