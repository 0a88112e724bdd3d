# sft-play: every command in one place. `make help` lists them.
#
# CONFIG=file.yaml   default: configs/local.yaml if the quick start wrote it, else configs/run_bnb.yaml
# SET="a.b=1 c.d=2"  overrides single keys        RAW=file   raw data        STYLE="..."   a style or a preset
# PYTHON=python      use an environment of your own instead of .venv

.DEFAULT_GOAL := help
.PHONY: help coverage install install-dev install-unsloth lock setup-dirs download-model demo-model process style render \
	full-pipeline style-if-set preview report-data plan check train train-bnb train-unsloth train-with-tb train-bnb-tb \
	train-unsloth-tb pause resume doctor tensorboard tb-stop tb-clean tb-open eval eval-val eval-test eval-quick eval-full compare lm-eval infer \
	infer-interactive infer-batch merge merge-bf16 merge-test export push \
	config-docs test test-all fuzz test-faults lint clean quick-start

PYTHON ?= .venv/bin/python
CONFIG ?=
SET ?=
RAW ?=
USER_COL ?=
ANSWER_COL ?=
STYLE ?=
MODEL ?=
TB_PORT ?= 6006
INPUT ?= $(firstword $(wildcard demo_inputs.txt) data/samples/questions.txt)
OUTPUT ?= outputs/preds.txt
ADAPTERS ?=
BASE ?=
FORCE ?=
GPU ?=
TASKS ?=
ARGS ?=
export RAW USER_COL ANSWER_COL STYLE INPUT OUTPUT GPU TASKS
.NOTPARALLEL:

KNOWN := CONFIG SET RAW USER_COL ANSWER_COL STYLE MODEL MODELS TB_PORT INPUT OUTPUT ADAPTERS BASE FORCE GPU PNG TASKS ARGS FORMAT TYPE REPO DRY PYTHON
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name)))
$(foreach name,$(filter-out $(KNOWN) SHELL MAKEFLAGS,$(GIVEN)),$(error $(name)= is not a variable of this kit. Known: $(KNOWN). \
	Set a config key with SET="key=value"))

ENV := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/.ready)
DEV := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/.ready-dev)
WITH := $(if $(CONFIG),--config $(CONFIG)) $(foreach pair,$(SET),--set '$(pair)')
UNSLOTH := $(if $(CONFIG)$(wildcard configs/local.yaml),,--config configs/run_unsloth.yaml) --set tuning.backend=unsloth
FROM := $(if $(ADAPTERS),--adapters $(ADAPTERS))
RUN := $(PYTHON) scripts

help: ## list every command
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}' Makefile | \
		if [ -t 1 ]; then cat; else sed 's/\x1b\[[0-9;]*m//g'; fi

quick-start: ## guided set-up, from nothing to a tuned model that you can chat with
	./workflows/quick_start.sh

install: .venv/.ready ## create .venv with the exact set in requirements.lock (with uv if it is installed, else pip)
install-dev: .venv/.ready-dev ## the same, with the packages for tests and lint
install-unsloth: ## add the optional unsloth backend (NVIDIA GPUs)
	env/install.sh unsloth
.venv/.ready: requirements.txt requirements.lock env/install.sh
	env/install.sh base
.venv/.ready-dev: requirements.txt requirements-dev.txt requirements.lock env/install.sh
	env/install.sh dev
lock: ## resolve requirements*.txt into requirements.lock again (needs uv)
	env/lock.sh

setup-dirs: ## create the folders that the pipeline writes to
	mkdir -p data/raw data/processed data/processed_with_style data/rendered outputs adapters
download-model: $(ENV) ## download a model into the hub's cache, resumable (MODEL=Qwen/Qwen2.5-3B-Instruct)
	$(RUN)/download_model.py $(WITH) $(if $(MODEL),--model $(MODEL))
demo-model: $(ENV) ## build models/demo from generated text (up to 90 minutes on 2 cores)
	$(PYTHON) dev/make_demo_model.py

process: $(ENV) ## raw data -> data/processed/{train,val,test}.jsonl (RAW=file USER_COL=.. ANSWER_COL=..)
	$(RUN)/process_data.py $(WITH) $(if $(RAW),--raw_path "$$RAW") $(if $(USER_COL),--user_col "$$USER_COL") \
	  $(if $(ANSWER_COL),--answer_col "$$ANSWER_COL")
style: $(ENV) ## add a style to the system text of every split (STYLE="Answer in JSON" or a preset)
	$(RUN)/style_prompt.py $(WITH) --style "$$STYLE"
render: $(ENV) ## write prompt and answer of each row as the chat template renders them (optional)
	$(RUN)/render_template.py $(WITH)
full-pipeline: setup-dirs process style-if-set render ## setup-dirs, process, style (with STYLE=), render
style-if-set: $(ENV)
	$(if $(STYLE),$(RUN)/style_prompt.py $(WITH) --style "$$STYLE",@echo "no STYLE=: skipping style")
preview: $(ENV) ## show rows token by token: what is in the loss, what is masked
	$(RUN)/preview.py $(WITH)
report-data: $(ENV) ## write a page with plots of the training rows (outputs/reports/data.html)
	$(RUN)/report_data.py $(WITH)
plan: $(ENV) ## will it fit? memory of every phase by part, and what would help (SET="model.name=...", GPU="8GiB", PNG=f)
	$(RUN)/plan.py $(WITH) $(if $(GPU),--gpu "$$GPU") $(if $(PNG),--png "$(PNG)")
plan-models: $(ENV) ## which models fit this card (GPU="8GiB", MODELS="names or a file")
	$(RUN)/plan.py $(WITH) $(if $(GPU),--gpu "$$GPU") --models $(MODELS)
check: $(ENV) ## check environment, config, data, template, model, disk, memory and ports, with a fix for each problem
	$(RUN)/check.py $(WITH) --port $(TB_PORT)
doctor: $(ENV) ## versions, machine, checks, last run, last error: one redacted text for a bug report
	@$(RUN)/doctor.py $(WITH)

train: $(ENV) ## train, or resume an unfinished run
	$(RUN)/train.py $(WITH)
train-bnb: $(ENV) ## train with the bitsandbytes backend
	$(RUN)/train.py $(WITH) --set tuning.backend=bnb
train-unsloth: $(ENV) ## train with the unsloth backend (falls back to bnb and says why)
	$(RUN)/train.py $(WITH) $(UNSLOTH)
train-with-tb: tensorboard train ## train, with TensorBoard in the background
train-bnb-tb: tensorboard train-bnb ## train-bnb, with TensorBoard in the background
train-unsloth-tb: tensorboard train-unsloth ## train-unsloth, with TensorBoard in the background
resume: $(ENV) ## resume the newest unfinished run at its newest valid checkpoint
	$(RUN)/train.py $(WITH) --resume auto
pause: $(ENV) ## stop the run at the next step, with a checkpoint
	$(RUN)/pause.py

tensorboard: $(ENV) ## start TensorBoard in the background, or reuse the one already started (TB_PORT=6006)
	$(RUN)/tb.py start --port $(TB_PORT)
tb-stop: $(ENV) ## stop the TensorBoard that `make tensorboard` started
	$(RUN)/tb.py stop
tb-clean: $(ENV) ## remove the event files under outputs/tb (asks, or FORCE=1)
	$(RUN)/tb.py clean $(if $(FORCE),--force)
tb-open: $(ENV) ## print TensorBoard's address and the folder it reads
	$(RUN)/tb.py open --port $(TB_PORT)

eval: eval-val ## evaluate the newest run on the validation split
eval-val: $(ENV) ## the same
	$(RUN)/eval.py $(WITH) $(FROM) --split val
eval-test: $(ENV) ## evaluate tuned and base model on the test split
	$(RUN)/eval.py $(WITH) $(FROM) --split test --both
eval-quick: $(ENV) ## evaluate on at most 200 validation rows
	$(RUN)/eval.py $(WITH) $(FROM) --split val --limit 200
eval-full: $(ENV) ## evaluate on every validation row, whatever eval.limit says
	$(RUN)/eval.py $(WITH) $(FROM) --split val --limit 0

compare: $(ENV) ## base against tuned: verdict, intervals, forgetting, answers side by side (outputs/<run>/report; ARGS=)
	$(RUN)/compare.py $(WITH) $(FROM) $(ARGS)
lm-eval: $(ENV) ## run tasks of lm-evaluation-harness, if it is installed (TASKS=hellaswag,arc_easy)
	$(RUN)/lm_eval.py $(WITH) $(FROM) --tasks "$$TASKS" $(ARGS)
infer: infer-interactive ## chat with the newest run (BASE=1: with its base model)
infer-interactive: $(ENV) ## the same
	$(RUN)/infer.py $(WITH) $(FROM) $(if $(BASE),--base)
infer-batch: $(ENV) ## answer a file (INPUT=questions.txt or .jsonl, OUTPUT=outputs/preds.txt)
	$(RUN)/infer.py $(WITH) $(FROM) $(if $(BASE),--base) --mode batch --input_file "$$INPUT" --output_file "$$OUTPUT"
merge: $(ENV) ## merge the newest adapter into fp16 weights (outputs/merged_fp16)
	$(RUN)/merge_lora.py $(WITH) $(FROM) --out outputs/merged_fp16 --dtype fp16
merge-bf16: $(ENV) ## the same in bf16 (outputs/merged_bf16)
	$(RUN)/merge_lora.py $(WITH) $(FROM) --out outputs/merged_bf16 --dtype bf16
merge-test: $(ENV) ## load the merged model and generate answers
	$(RUN)/merge_lora.py $(WITH) --out outputs/merged_fp16 --test
export: $(ENV) ## export the newest run as GGUF, for Ollama or as safetensors, and verify its tokens (FORMAT=gguf|ollama|hf TYPE=f16|q8_0)
	$(RUN)/export.py $(WITH) $(FROM) --format $(or $(FORMAT),gguf) --type $(or $(TYPE),f16)
push: $(ENV) ## upload the newest export to the hub with its model card (REPO=me/model, DRY=1 only lists the files)
	$(RUN)/push.py --repo "$(REPO)" $(if $(DRY),--dry-run)

config-docs: $(ENV) ## write docs/CONFIG.md from the schema
	$(RUN)/config_reference.py
test: $(DEV) ## every test but the slow ones, at most 6 minutes on 2 quiet cores
	$(PYTHON) -m pytest -n 2 -m "not slow"
coverage: $(DEV) ## the same tests with coverage of scripts/ (half as long again)
	$(PYTHON) -m pytest -n 2 -m "not slow" --cov --cov-report=term:skip-covered
test-all: $(DEV) ## the slow tests too, at most 60 minutes
	$(PYTHON) -m pytest -n 2 --timeout 3000 --cov --cov-report=term:skip-covered
test-faults: $(DEV) ## inject every fault into a run and resume it; about an hour; writes benchmarks/results/faults-DATE.json
	$(PYTHON) tests/faults/sweep.py --all --tensorboard --jobs 2 --out benchmarks/results/faults-$$(date +%F).json
fuzz: $(DEV) ## five minutes of random bytes and rows for the readers
	PYTHONPATH=scripts $(PYTHON) -m tests.data.fuzz 300
lint: $(DEV) ## ruff, mypy, and pip-audit if the network is available
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	@env/audit.sh $(PYTHON)
clean: $(ENV) ## remove generated files, never data/raw (asks, or FORCE=1)
	$(RUN)/clean.py $(if $(FORCE),--force)
