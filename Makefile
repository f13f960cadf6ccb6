# Every target sets up what it needs; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

SCALE ?= mini
SEEDS ?= 0
HARDWARE ?= cpu
TEST_JOBS ?= 2
DATA ?= $(or $(ASSEMBLE_DATA),data)
PYTHON ?= python3

VENV := .venv
STAMP := $(VENV)/.installed
# PyTorch's builds: `cpu`, or those of the lock, which are `cuda` on Linux. A cluster's login node may have no GPU (docs/platforms.md).
TORCH ?= $(if $(filter Linux,$(shell uname)),$(if $(shell nvidia-smi -L 2>/dev/null; command -v sbatch),cuda,cpu),cuda)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ASSEMBLE := $(VENV)/bin/assemble
PAPERS := $(notdir $(patsubst %/tables.yaml,%,$(wildcard papers/*/tables.yaml)))
# RELEASED: folder of the authors' weights. GIVEN: files that stand for stages, as in GIVEN="avid=FILE avid_cma=FILE".
RUN = --scale $(SCALE) --seeds $(SEEDS) --hardware $(HARDWARE) --data "$(DATA)" \
  $(if $(RELEASED),--released "$(RELEASED)") $(if $(GIVEN),--given $(GIVEN))
# After an edit of the code: RERUN=1 runs finished stages again, KEEP=1 uses them as they are.
CODE = $(if $(RERUN),--rerun) $(if $(KEEP),--keep)
REHEARSED = $(if $(filter single,$(SCALE)),--scale single) $(if $(RELEASED),--released)

# On small networks one thread per process is faster than two. The records were made with one.
export OMP_NUM_THREADS ?= 1
export WANDB_SILENT ?= true
# Keep large blocks: by default glibc returns them at once and maps them again, page by page, at the next step.
reproduce reproduce-% bench: export MALLOC_MMAP_THRESHOLD_ ?= 268435456
reproduce reproduce-% bench: export MALLOC_TRIM_THRESHOLD_ ?= 268435456

# A misspelled variable would change nothing. What programs read may be set here as well.
VARIABLES := SCALE SEEDS HARDWARE DATA TORCH TORCH_INDEX PYTHON TEST_JOBS FAST ESTIMATE UPGRADE BENCH GROWTH FILE SAMPLE \
  RECORD PAPER RELEASED GIVEN RERUN KEEP FUZZ_MINUTES FUZZ_SEED FUZZ_TARGET PAPERS VENV
PROGRAMS := ASSEMBLE_% WANDB_% HF_% OMP_% MALLOC_% CUDA_% NCCL_% SBATCH_% UV_% PIP_% PYTHON% LD_% SHELL MAKEFLAGS
UNKNOWN := $(filter-out $(VARIABLES) $(PROGRAMS),$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
ifneq ($(UNKNOWN),)
NEAREST = $(shell $(PYTHON) -c 'import difflib; print(*difflib.get_close_matches("$(firstword $(UNKNOWN))", "$(VARIABLES)".split(), 1))' 2>/dev/null)
$(error there is no variable $(firstword $(UNKNOWN)): $(if $(NEAREST),did you mean $(NEAREST)?) variables: $(VARIABLES))
endif

.PHONY: help setup lock lock-check test test-slow fuzz lint format docs bench mutation reproduce rehearse verify tables check-tables claims report dashboard wandb-report gpu-check doctor clean

##@ Set up

help: ## List the targets
	@grep -hE '^##@ |^[a-zA-Z_%-]+:.*?## ' $(MAKEFILE_LIST) \
	  | sed -E 's/^##@ (.*)/\n\1/; s/^([a-zA-Z_%-]+):.*## (.*)/  \1\t\2/' | expand -t 22
	@echo; echo "  variables: SCALE=smoke|mini|single|paper SEEDS=\"0 1 2\" TEST_JOBS=2 HARDWARE=cpu|gpu1|gpu8|slurm DATA=folder RERUN=1 KEEP=1 RELEASED=folder GIVEN=stage=file TORCH=cpu|cuda"

setup: $(STAMP) ## Make the virtual environment from requirements.lock

# If uv is missing, pip installs it into .uv, because some systems do not allow pip outside a virtual environment.
# The lock without CUDA comes first: packages that are installed when the index of CPU builds does not answer, are needed anyway.
$(STAMP): requirements.lock requirements-cpu.lock pyproject.toml
	@command -v uv >/dev/null || test -x .uv/bin/uv || { echo "installing uv"; $(PYTHON) -m venv .uv && .uv/bin/pip install --quiet uv; }
	@UV=$$(command -v uv || echo "$(CURDIR)/.uv/bin/uv"); set -e; \
	  case "$(TORCH)" in cpu|cuda) ;; *) echo "TORCH=$(TORCH): choose cpu or cuda"; exit 2;; esac; \
	  test -x $(VENV)/bin/python || "$$UV" venv --quiet --python $(PYTHON) $(VENV); \
	  export VIRTUAL_ENV="$(CURDIR)/$(VENV)"; \
	  all() { "$$UV" pip sync --compile-bytecode --require-hashes requirements.lock; }; \
	  if [ "$(TORCH)" = cpu ]; then \
	    echo "PyTorch: CPU builds, a download of 0.5 GB (TORCH=cuda make setup: builds for NVIDIA GPUs, 3.3 GB)"; \
	    awk '/^[^ ]/ { kept = !/^(torch|torchvision|torchaudio|triton)==|^nvidia-|^cuda-/ } kept' requirements.lock \
	      | "$$UV" pip sync --compile-bytecode --require-hashes -; \
	    "$$UV" pip install --compile-bytecode --no-deps --default-index $(TORCH_INDEX) -r requirements-cpu.lock \
	      || { echo "PyTorch: $(TORCH_INDEX) gave no CPU builds, so requirements.lock is installed, with CUDA (3.3 GB)"; all; }; \
	  else \
	    echo "PyTorch: builds of requirements.lock, with CUDA on Linux (TORCH=cpu make setup: CPU builds, 0.5 GB in place of 3.3)"; all; \
	  fi; \
	  "$$UV" pip install --quiet --no-deps --editable .
	@touch $@

extra-%: $(STAMP) ## Install an optional part (extra-tensorboard, extra-captioning; see pyproject.toml)
	@UV=$$(command -v uv || echo "$(CURDIR)/.uv/bin/uv"); export VIRTUAL_ENV="$(CURDIR)/$(VENV)"; \
	  "$$UV" pip install --quiet --constraint requirements.lock --editable ".[$*]"

# One lock for all systems, by markers. Versions that still fit are kept; UPGRADE=1 takes the newest. The CPU builds of the same
# versions are locked without hashes if their index cannot be reached.
lock: ## Rewrite requirements.lock from pyproject.toml (UPGRADE=1: newest versions)
	@UV=$$(command -v uv || echo "$(CURDIR)/.uv/bin/uv"); \
	  "$$UV" pip compile pyproject.toml --quiet --extra dev --extra features --extra wandb-reports --universal \
	    --python-version 3.11 --generate-hashes --no-header --no-annotate $(if $(UPGRADE),--upgrade) --output-file requirements.lock; \
	  pins=$$(grep -oE '^torch(vision|audio)?==[^ ]+' requirements.lock); \
	  "$$UV" pip compile - --quiet --no-deps --python-version 3.11 --python-platform linux --default-index $(TORCH_INDEX) \
	    --generate-hashes --no-header --no-annotate <<< "$$pins" > requirements-cpu.lock || echo "$$pins" > requirements-cpu.lock

PLATFORMS := x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu aarch64-apple-darwin

# Installs nothing. 14.0 is the oldest macOS that the wheels support.
lock-check: ## Check that the lock installs from wheels on every system, Python 3.11 to 3.13
	@UV=$$(command -v uv || echo "$(CURDIR)/.uv/bin/uv"); failed=0; \
	  for platform in $(PLATFORMS); do for python in 3.11 3.12 3.13; do \
	    if told=$$(MACOSX_DEPLOYMENT_TARGET=14.0 "$$UV" pip install --dry-run --only-binary :all: --require-hashes \
	      --python-platform $$platform --python-version $$python --target .lock-check -r requirements.lock 2>&1); \
	    then echo "$$platform, Python $$python: $$(grep -c '^ + ' <<< "$$told") packages"; \
	    else failed=1; echo "$$platform, Python $$python: $$told"; fi; \
	  done; done; exit $$failed

##@ Run

reproduce-%: $(STAMP) ## Train and evaluate one paper (avid), print and write its tables
	$(ASSEMBLE) reproduce $* $(RUN) $(CODE)

# One failed paper does not stop the others; Ctrl-C, a closed terminal or TERM stops all.
reproduce: $(STAMP) ## Train and evaluate all papers
	@failed=0; for paper in $(PAPERS); do \
	  $(ASSEMBLE) reproduce $$paper $(RUN) $(CODE) || { status=$$?; case $$status in 129|130|138|143) exit $$status;; esac; failed=1; }; done; exit $$failed

rehearse-%: $(STAMP) ## Run a paper's published recipes on tiny data in the real layouts (RELEASED=1: from such weights)
	$(ASSEMBLE) rehearse $* $(REHEARSED)

rehearse: $(STAMP) ## Rehearse all papers
	$(ASSEMBLE) rehearse $(REHEARSED)

data-%: $(STAMP) ## List a paper's data sets, which were found, how to get the rest
	$(ASSEMBLE) data $* --data "$(DATA)"

plan-%: $(STAMP) ## Print a paper's stages and what is left to run; ESTIMATE=1: memory and GPU hours
	$(ASSEMBLE) plan $* $(RUN) $(if $(ESTIMATE),--estimate)

##@ Results

tables: $(STAMP) ## Render every table from stored records into the READMEs; never trains
	$(ASSEMBLE) tables

check-tables: $(STAMP) ## Fail if a README does not match the records
	$(ASSEMBLE) tables --check

claims: $(STAMP) ## Judge the papers' claims over the stored records
	$(ASSEMBLE) claims

contribute-%: $(STAMP) ## Pack a paper's finished stages at SCALE into one archive to send
	$(ASSEMBLE) contribute $* --scale $(SCALE)

report: $(STAMP) ## Write one static HTML page: claims, tables, charts, curves, pictures, clips
	$(ASSEMBLE) report

# Every stage has its own folder, but the dashboard takes one: a folder of links.
dashboard: $(STAMP) ## Open W&B's terminal dashboard over all runs here; needs no account
	@mkdir -p runs/wandb && find runs/wandb -type l -delete
	@for run in runs/*/*/seed*/*/wandb/*run-*; do \
	  case "$$run" in *.previous*) ;; *) if test -d "$$run"; then ln -s "$(CURDIR)/$$run" runs/wandb/; fi ;; esac; done
	$(VENV)/bin/wandb leet runs/wandb

wandb-report: $(STAMP) ## Publish W&B reports of all papers; without a key, write files to runs/
	$(ASSEMBLE) wandb-report

##@ This machine

verify: $(STAMP) ## Check that this code, on this machine, computes what was recorded (RECORD=1: record it)
	$(ASSEMBLE) verify $(PAPER) $(if $(RECORD),--record)

gpu-check: $(STAMP) ## Measure every paper's training step on this machine's GPU, without data
	$(ASSEMBLE) gpu-check $(PAPERS)

doctor: $(STAMP) ## Check this machine: GPU, keys, packages, data sets
	$(ASSEMBLE) doctor --data "$(DATA)"

##@ Develop

# What FAST=1 runs: units and contracts, without training and media.
UNITS := $(addprefix tests/,architecture encoders losses memory metrics reporting test_files.py test_types.py) \
  $(wildcard tests/data/test_dataset*.py tests/*/test_loss*.py) \
  --deselect tests/architecture/test_configs.py::test_a_recipe_instantiates

# Keep compiled files even if the shell turns that off: compiling our code takes each process a second.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(STAMP) ## Run the tests, without network and GPU; FAST=1: only unit and contract tests
	$(VENV)/bin/python -m pytest -n $(TEST_JOBS) -rs $(if $(FAST),$(UNITS))

test-slow: $(STAMP) ## Run the tests that train for minutes
	$(VENV)/bin/python -m pytest -m slow -o addopts="-q --strict-markers"

fuzz: $(STAMP) ## Feed damaged files to every reader: FUZZ_MINUTES=3 FUZZ_SEED=0 FUZZ_TARGET=media; docs/reliability.md
	$(VENV)/bin/python -m tests.fuzz --minutes $(or $(FUZZ_MINUTES),3) --seed $(or $(FUZZ_SEED),0) \
		$(if $(FUZZ_TARGET),--target "$(FUZZ_TARGET)")

docs: $(STAMP) $(VENV)/.docs ## Build the site of all pages in site/; a dead link is an error
	$(VENV)/bin/python .ci/site.py site
	@echo "site/index.html; with search: python -m http.server --directory site"

# Not a dependency of the suite.
$(VENV)/.docs: $(STAMP)
	@UV=$$(command -v uv || echo "$(CURDIR)/.uv/bin/uv"); export VIRTUAL_ENV="$(CURDIR)/$(VENV)"; \
	  "$$UV" pip install --quiet --constraint requirements.lock "mkdocs-material>=9.5,<10" "mkdocstrings[python]>=0.26,<2" && touch $@

# Where torchcodec finds PyAV's FFmpeg, under the names it looks for.
bench: export LD_LIBRARY_PATH := $(CURDIR)/$(VENV)/ffmpeg$(addprefix :,$(LD_LIBRARY_PATH))
bench: $(STAMP) $(VENV)/.bench ## Compare speed with other implementations, into docs/speed.md; GROWTH=1: time and memory against N
	BENCH=$(or $(BENCH),docs/speed.md) $(VENV)/bin/python -m pytest tests/benchmarks$(if $(GROWTH),/test_growth.py) -o addopts="" -q -s -rs

# The peers are not dependencies of the suite. If one cannot be installed, its comparison is skipped.
$(VENV)/.bench: $(STAMP)
	@UV=$$(command -v uv || echo "$(CURDIR)/.uv/bin/uv"); export VIRTUAL_ENV="$(CURDIR)/$(VENV)"; \
	  "$$UV" pip install --quiet --constraint requirements.lock --editable ".[bench]" \
	    && "$$UV" pip install --quiet --no-deps "torchcodec>=0.17" \
	    && touch $@ || echo "not all peers could be installed: their comparisons are skipped"
	@mkdir -p $(VENV)/ffmpeg; for file in $(CURDIR)/$(VENV)/lib/python*/site-packages/av.libs/lib{av,sw}*; do \
	  test ! -e "$$file" || ln -sf "$$file" "$(VENV)/ffmpeg/$$(basename "$$file" | sed -E 's/-[0-9a-f]+(\.so\.[0-9]+).*/\1/')"; done

# The jars of METEOR and of the original tokenizer, for the tests that need Java.
$(VENV)/.captioning: $(STAMP)
	@UV=$$(command -v uv || echo "$(CURDIR)/.uv/bin/uv"); export VIRTUAL_ENV="$(CURDIR)/$(VENV)"; \
	  "$$UV" pip install --quiet --constraint requirements.lock "pycocoevalcap>=1.2" && touch $@

# SAMPLE is for the code outside the losses.
mutation: $(STAMP) $(VENV)/.mutation ## List changes to the losses that no test notices (FILE=common/losses/nce.py, SAMPLE=100)
ifdef SAMPLE
	$(VENV)/bin/python -m tests.mutation_sample --sample $(SAMPLE) --seed $(firstword $(SEEDS)) --jobs $(TEST_JOBS)
else
	$(VENV)/bin/mutmut run --max-children $(TEST_JOBS) $(if $(FILE),"$(subst /,.,$(basename $(FILE))).*")
	@found=$$($(VENV)/bin/mutmut results) && { grep -v -e ': not checked$$' -e '^$$' <<< "$$found" \
	  || echo "every change that was tried is noticed by a test"; }
endif

# Not a dependency of the suite.
$(VENV)/.mutation: $(STAMP)
	@UV=$$(command -v uv || echo "$(CURDIR)/.uv/bin/uv"); export VIRTUAL_ENV="$(CURDIR)/$(VENV)"; \
	  "$$UV" pip install --quiet --constraint requirements.lock "mutmut>=3.8,<4" "pytest-cov>=6" && touch $@

lint: $(STAMP) ## Check style, types and workflows
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	@if lint=$$(PATH="$(VENV)/bin:$$PATH" command -v actionlint); then echo "$$lint"; "$$lint"; \
	  else echo "actionlint is missing (make extra-actions), so .github/workflows is not checked"; fi

format: $(STAMP) ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove the virtual environment (runs and results stay)
	rm -rf $(VENV)
