# The JSONL files are a graph; this says which command makes which file.
#
#   make demo            the whole method on the embedded task, files under out/demo (make demo OUT=... elsewhere)
#   make ablations       every method of the paper's table and its ablations, five seeds, files under out/ablations
#                        (make ablations ROWS="tract a1" SEEDS="1 2")
#   make test            the tests
#   make clean           remove out/demo

PYTHON ?= python3
OUT    ?= out/demo
RUN     = .venv/bin/python
TINY    = data/tiny

ROWS    ?= main sweeps scale
SEEDS   ?= 1 2 3 4 5

.PHONY: demo ablations test lint clean
.DELETE_ON_ERROR:

demo: $(OUT)/predictions_p_s.jsonl $(OUT)/predictions.jsonl
	$(RUN) eval.py $^ --out $(OUT)/eval --overwrite
	$(RUN) eval.py --logs $(OUT)/stage1/log.jsonl $(OUT)/stage2/log.jsonl --out $(OUT)/eval

$(OUT)/stage1/run.json: | .venv/run
	$(RUN) stage1_train.py --model $(TINY)/seed --data $(TINY)/train.jsonl --out $(OUT)/stage1

$(OUT)/cots.jsonl: $(OUT)/stage1/run.json
	$(RUN) gen_cot.py --model $(OUT)/stage1 --data $(TINY)/train.jsonl --out $@

$(OUT)/stage2/run.json: $(OUT)/cots.jsonl
	$(RUN) stage2_train.py --model $(TINY)/seed --data $< --out $(OUT)/stage2

$(OUT)/predictions_p_s.jsonl: $(OUT)/stage1/run.json
	$(RUN) predict.py --model $(OUT)/stage1 --data $(TINY)/test.jsonl --out $@

$(OUT)/predictions.jsonl: $(OUT)/stage2/run.json
	$(RUN) predict.py --model $(OUT)/stage2 --data $(TINY)/test.jsonl --out $@

ablations: | .venv/run
	$(RUN) bench/ablations.py --rows $(ROWS) --seeds $(SEEDS)
	$(RUN) results/ablations/draw.py out/ablations/metrics.json

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

lint: .venv/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf out/demo

# Bytecode is compiled when a module is first imported: packages this large take a minute to compile whole
.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-compile -r $<
	touch $@

.venv/test: requirements-dev.txt .venv/run
	.venv/bin/pip install --quiet --no-compile -r $<
	touch $@
