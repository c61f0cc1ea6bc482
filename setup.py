"""The live packaging metadata: requirements, extras and commands come from settings.ini; pyproject.toml declares them dynamic."""
from configparser import ConfigParser
from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
lines = lambda key: config["DEFAULT"][key].strip().splitlines()
extras = {name: lines(f"{name}_requirements") for name in ("serve", "evaluate", "study", "cluster", "kaggle", "dev")}
extras["study"] += extras["evaluate"]
extras["dev"] += extras["study"] + extras["cluster"] + extras["serve"]

setup(packages=find_packages(include=["cxr_study", "cxr_study.*"]), package_data={"cxr_study": ["pages/*"], "cxr_study.serve": ["page/*"]}, install_requires=lines("requirements"), extras_require=extras,
      entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["cxr_study = cxr_study._modidx:d"]})
