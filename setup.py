"""The live packaging metadata: requirements, extras and commands come from settings.ini; pyproject.toml declares
them dynamic."""

import json
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithNotebooks(build_py):
    "Puts the stage notebooks, without outputs, into the package: `cxr-study run` executes them"

    def run(self):
        super().run()
        if self.editable_mode:  # A checkout has them in nbs/
            return
        folder = Path(self.build_lib) / "cxr_study/notebooks"
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path("nbs").glob("0*.ipynb")):
            notebook = json.loads(path.read_text(encoding="utf-8"))
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    cell["outputs"] = []
            (folder / path.name).write_text(json.dumps(notebook, indent=1), encoding="utf-8")


config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")


def lines(key):
    return config["DEFAULT"][key].strip().splitlines()


extras = {
    name: lines(f"{name}_requirements")
    for name in ("serve", "evaluate", "study", "cluster", "kaggle", "share", "dev")
}
extras["study"] += extras["evaluate"]
extras["dev"] += extras["study"] + extras["cluster"] + extras["serve"]

setup(
    packages=find_packages(include=["cxr_study", "cxr_study.*"]),
    package_data={
        "cxr_study": ["pages/*"],
        "cxr_study.data": ["*.csv"],
        "cxr_study.serve": ["page/*"],
    },
    cmdclass={"build_py": BuildWithNotebooks},
    install_requires=lines("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": ["cxr_study = cxr_study._modidx:d"],
    },
)
