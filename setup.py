"""The live packaging metadata: read from settings.ini, which people edit; pyproject.toml declares these fields dynamic."""
from configparser import ConfigParser
from setuptools import setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lines = lambda key: cfg.get(key, "").strip().splitlines()
extras = {name: lines(f"{name}_requirements") for name in ("study", "kaggle", "dev")}
extras["dev"] = extras["study"] + extras["dev"]

setup(description=cfg["description"], keywords=cfg["keywords"].split(), packages=[cfg["package"]], include_package_data=True,
      author=cfg["author"], author_email=cfg["author_email"], python_requires=f">={cfg['min_python']}",
      install_requires=lines("requirements"), extras_require=extras, entry_points={"console_scripts": lines("console_scripts")})
