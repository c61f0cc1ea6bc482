"""The functions that a study notebook defines, for tests and benchmarks. Study notebooks export no module."""

import ast
import functools
import json
import re
import sys
import types
from pathlib import Path

NBS = Path(__file__).parent.parent / "nbs"


def _is_definition(statement: ast.stmt) -> bool:
    "Whether a statement imports, defines a function or class, or sets a constant in capitals"
    if isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
        return True
    if not isinstance(statement, ast.Assign):
        return False
    nodes = [node for target in statement.targets for node in ast.walk(target)]
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    return bool(names) and all(name.isupper() for name in names)


def _definitions(source: str) -> ast.Module:
    "Only the definitions of a cell; lines of IPython commands are removed"
    python = re.sub(r"^\s*[%!].*$", "", source, flags=re.M)
    statements = ast.parse(python).body
    return ast.Module([s for s in statements if _is_definition(s)], [])


@functools.cache
def functions_of(name: str) -> types.ModuleType:  # Such as 'results/01_summary'
    "Module with the imports, functions and constants of `nbs/<name>.ipynb`; nothing else is executed"
    module = types.ModuleType(name.replace("/", "."))
    sys.modules[module.__name__] = module  # dataclasses and timm need it there
    notebook = json.loads((NBS / f"{name}.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = compile(_definitions("".join(cell["source"])), name, "exec")
            exec(code, module.__dict__)
    return module
