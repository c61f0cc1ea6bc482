# The two commands of the README: `make study` and `make test`. Each sets up its environment first and continues where it was interrupted.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
SHARE  := $(abspath $(VENV))/share/validators
ARGS   ?=

.PHONY: study test lab readme docs manuscript lock hooks clean help

help:            ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort

study: $(BIN)/.installed   ## run the whole study and print where the report is (ARGS="--dataset ...")
	$(BIN)/cxr-study run $(ARGS)

test: $(BIN)/.installed $(SHARE)/.installed   ## check the style, test the notebooks, then the whole system
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --do-print --n-workers 2
	OMP_NUM_THREADS=1 PYTHONPATH=$(SHARE) $(BIN)/pytest --numprocesses 2 tests/test_sharing.py
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lab: $(BIN)/.installed     ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

readme: $(BIN)/.installed  ## README.md from nbs/index.ipynb
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --output-dir . --output README nbs/index.ipynb
	sed -i.bak 's#](headline.png)#](nbs/headline.png)#' README.md && rm README.md.bak

docs: $(BIN)/.installed    ## the site; needs Quarto
	$(BIN)/nbdev-docs

manuscript: $(BIN)/.installed   ## the study as a Quarto manuscript; needs Quarto, and TeX for the PDF (TO=html without)
	rm -rf _manuscript
	$(BIN)/python tools/manuscript.py _manuscript
	quarto render _manuscript $(if $(TO),--to $(TO))

hooks: $(BIN)/.installed   ## clean notebooks on save and merge
	$(BIN)/nbdev-install-hooks

LOCK = uv pip compile --quiet --refresh-package cxr-study --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
       --no-emit-find-links --no-annotate --no-header pyproject.toml
lock:                      ## resolve the locked requirements again; needs uv
	$(LOCK) --extra dev -o requirements.lock
	$(LOCK) --extra serve -o requirements-serve.lock
	$(LOCK) --extra evaluate -o requirements-evaluate.lock
	sed -n 's/ \\$$//; /^rich==/d; /^[a-zA-Z].*==/p' requirements.lock > constraints.txt
	$(LOCK) --extra share -c constraints.txt -o requirements-share.lock $$(sed -n 's/==.*//; /^rich$$/d; s/^/--no-emit-package /p' constraints.txt)
	rm constraints.txt

clean:                     ## remove runs and caches, keep the environment
	rm -rf runs cache _docs _proc

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# On Linux x86-64 every package is pinned with its hash; elsewhere the newest that settings.ini allows are taken.
$(BIN)/.installed: requirements.lock settings.ini setup.py pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): about 6 GB, some minutes; an interrupted installation continues"
ifeq ($(shell uname -sm),Linux x86_64)
	$(BIN)/pip install --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
else
	$(BIN)/pip install --disable-pip-version-check -e '.[dev]'
endif
	@touch $@

# The validators of test_sharing want an older rich than the rest: they lie in a folder that only this test sees.
$(SHARE)/.installed: requirements-share.lock | $(BIN)/.installed
	rm -rf $(SHARE)
	$(BIN)/pip install --disable-pip-version-check --no-deps --require-hashes --target $(SHARE) -r requirements-share.lock
	@touch $@
