"""The command line's help and suggestions, and figures in a notebook."""

import base64
import io
import subprocess
import sys

import nbclient
import nbformat
import pytest
from conftest import ROOT, bare
from PIL import Image

from cxr_study.cli import main
from cxr_study.core.options import STAGES, OptionError, check_options, options


def module_help(tmp_path, *command):
    "What `python -m cxr_study COMMAND --help` prints"
    done = subprocess.run(
        [sys.executable, "-m", "cxr_study", *command, "--help"],
        env=bare(tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_names_every_command_with_a_whole_sentence(tmp_path):
    text = module_help(tmp_path)
    assert text.startswith("Usage: python -m cxr_study [OPTIONS] COMMAND")
    _, _, listed = text.partition("Commands:\n")
    lines = dict(line.split(maxsplit=1) for line in listed.splitlines() if line.strip())
    assert set(lines) == set(main.commands)
    for name, sentence in lines.items():
        assert sentence.endswith(".") and "..." not in sentence, (name, sentence)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_help_of_a_command_fits_a_terminal(tmp_path, command):
    text = module_help(tmp_path, command)
    assert text.startswith(f"Usage: python -m cxr_study {command} ")
    assert "Examples:\n" in text and f"cxr-study {command}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_help_speaks_of_the_user_s_classes():
    for name, option in options().items():
        assert "NORMAL" not in option.help and "PNEUMONIA" not in option.help, name
        assert "missed pneumonia" not in option.help, name


@pytest.mark.parametrize(
    "wrong, right",
    [
        (dict(augment="afine"), "affine"),
        (dict(operating_point="sensitivity_98"), "sensitivity_0.98"),
        (dict(calibrator="plat"), "platt"),
        (dict(geometry="crops"), "crop"),
        (dict(geometry="leterbox"), "letterbox"),
        (dict(learning_rate=0.1, batchsize=8), None),
        (dict(batchsize=8), "batch_size"),
        (dict(loss="hinge"), None),
    ],
)
def test_a_misspelt_option_or_value_gets_a_suggestion(wrong, right):
    with pytest.raises(OptionError) as refused:
        check_options(wrong)
    message = str(refused.value).lower()
    if right is None:
        assert "did you mean" not in message
    else:
        assert message.count(f"did you mean {right!r}?") == 1
    assert refused.value.name in wrong


def test_choices_are_named_in_the_help_of_their_option():
    for stage in STAGES.values():
        for option in stage.options:
            missing = [choice for choice in option.choices if choice not in option.help]
            assert missing == [], option.name


def test_the_first_figure_of_a_notebook_is_small_too():
    "The backend of a notebook sets a formatter of its own when the first figure is made"
    code = "from cxr_study.core.style import figure\nfig, ax = figure()\nfig"
    cell = nbformat.v4.new_code_cell(code)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook, kernel_name="python3").execute()
    png = cell.outputs[-1].data["image/png"]
    assert Image.open(io.BytesIO(base64.b64decode(png))).mode == "P"
