# The commands of this repository ("make help" lists them); each installs what it needs in .venv first.
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt
OLDEST_TRANSFORMERS := $(shell sed -n 's/^requirements *=.*transformers>=\([0-9.]*\).*/\1/p' settings.ini)
NEWEST_TRANSFORMERS := 5.24.0
OLDEST := $(shell sed -n 's/^min_python *= *//p' settings.ini)

# The tests with another transformers: $(call test_with,version,folder for it).
define test_with
$(BIN)/python -m pip install $(PIP_ARGS) -q --no-deps --upgrade --target $(2) "transformers==$(1)"
PYTHONPATH=$(CURDIR)/$(2) $(BIN)/python -m pytest -n 2 $(ARGS)
endef

.PHONY: help setup dev toy test test-all test-oldest test-newest test-vllm bench bench-peers lab docs readme clean

help: ## list the targets (the default)
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo "Options: PYTHON=python3.11, PIP_ARGS='--index-url ...', ARGS='options of the command'"

setup: .venv/.run ## install what running needs, at the tested versions

dev: .venv/.dev ## install what tests, notebooks and pages need as well

toy: .venv/.run ## train the tiny model end to end
	$(BIN)/deepvideo-r1 toy $(ARGS)

test: .venv/.dev ## run the tests, every notebook among them
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-all: .venv/.dev ## run the slow tests too, and those for a GPU where there is one
	$(BIN)/python -m pytest -n 2 -m "" $(ARGS)

test-oldest: .venv/.dev ## run the tests with the oldest transformers that is supported
	$(call test_with,$(OLDEST_TRANSFORMERS),.oldest)

test-newest: .venv/.dev ## run the tests with the newest transformers that was tested
	$(call test_with,$(NEWEST_TRANSFORMERS),.newest)

test-vllm: .vllm/.installed ## run the tests of the vLLM engine, against vLLM for CPUs in an environment of its own
	.vllm/bin/python -m pytest tests/with_vllm $(ARGS)

bench: .venv/.run ## measure speed and memory against peers, half an hour (against TRL where it is installed)
	@for name in repeated_vs_packed rollout_vs_generate rollout_lengths growth augmentation_cost reading read_ahead; do $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; done
	@if $(BIN)/python -c 'import trl' 2>/dev/null; then $(BIN)/python benchmarks/step_vs_trl.py $(ARGS); \
	  else echo "TRL is not installed, see benchmarks/README.md: step_vs_trl.py was not run"; fi

bench-peers: .venv/.run ## measure a training step on a video beside ms-swift and Video-R1 (an hour, 4 GB in .peers/)
	-@$(MAKE) --no-print-directory .peers/ms-swift/.installed
	-@$(MAKE) --no-print-directory .peers/video-r1/.installed
	-@test -n "$(VIDEO_R1)" || $(MAKE) --no-print-directory .peers/Video-R1
	VIDEO_R1=$(VIDEO_R1) $(BIN)/python benchmarks/video_step_vs_peers.py $(ARGS)
	-@$(MAKE) --no-print-directory .peers/trl/.installed
	@test ! -f .peers/trl/.installed || \
	  PYTHONPATH=$(CURDIR):$(CURDIR)/.peers/trl .peers/ms-swift/bin/python benchmarks/trl_with_video.py --lengths 16

lab: .venv/.dev ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --ServerApp.root_dir=nbs $(ARGS)

docs: .venv/.dev ## build the site into _site/
	$(BIN)/python docs/build.py
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html -c docs _sphinx _site
	@echo "Open _site/index.html"

readme: .venv/.dev ## run nbs/index.ipynb and write README.md from it
	$(BIN)/python docs/readme.py

clean: ## remove built pages, packages and caches; .venv, .vllm, .peers and runs/ stay
	rm -rf .oldest .newest _sphinx _site jupyter_execute _proc _docs build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -not -path './.peers/*' -not -path './.vllm/*' -prune -exec rm -rf {} +

# The stamps make each installation happen once, and again when what it is made from has changed.
.venv/.run: settings.ini setup.py constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.run
	$(PIP) -e '.[dev]'
	@touch $@

# vLLM pins other versions than the tests do. torchvision's compiled operators do not fit torch for CPUs: they are declared.
.vllm/.installed: settings.ini setup.py tests/with_vllm/requirements.txt tests/with_vllm/torchvision_ops.py
	$(PYTHON) -m venv .vllm
	.vllm/bin/python -m pip install $(PIP_ARGS) -r tests/with_vllm/requirements.txt
	.vllm/bin/python -m pip uninstall -q -y torchaudio torchcodec
	.vllm/bin/python -m pip install $(PIP_ARGS) --no-deps -e .
	cp tests/with_vllm/torchvision_ops.py .vllm/lib/python3*/site-packages/
	echo 'import torchvision_ops' > "$$(echo .vllm/lib/python3*/site-packages)/torchvision_ops.pth"
	@touch $@

# The peers, each with the versions that it was measured with.
.peers/ms-swift/.installed .peers/video-r1/.installed: .peers/%/.installed: benchmarks/peers/%.txt | $(BIN)/python
	rm -rf .peers/$*
	$(PYTHON) -m venv .peers/$*
	.peers/$*/bin/python -m pip install $(PIP_ARGS) --no-compile -r $<
	@touch $@

.peers/trl/.installed: | .peers/ms-swift/.installed
	.peers/ms-swift/bin/python -m pip install $(PIP_ARGS) -q --no-compile --no-deps --upgrade --target .peers/trl trl==1.16.0
	@touch $@

.peers/Video-R1:
	rm -rf $@.aside
	git clone -q https://github.com/tulerfeng/Video-R1 $@.aside
	git -C $@.aside checkout -q 59d65c3
	mv $@.aside $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(OLDEST)".split("."))))' \
	  2>/dev/null || { echo "$(PYTHON) is missing or older than Python $(OLDEST): install a newer one and name it, make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install python3-venv (apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv
