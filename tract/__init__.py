"""All that a first reader of the scripts may skip; encode.py alone belongs to the first reading.

encode.py       from a record to token ids, and which positions carry loss
text.py         a prompt in its chat template, text that can't become a control token
records.py      the JSONL record and its score grid; checks.py: what is refused as a record
prompt.py       the judge prompt for records that bring none
models.py       load a model, run decoder and head; hub.py: where its files are; adapters.py: LoRA and others
writing.py      write CoTs and read scores: the loop, sampling; batch.py: its cache and padding
judge.py        a judge from Python, and what predict.py shares with it
files.py        JSONL in, JSONL out, going on where it was cut off
options.py      the options of the scripts, and their defaults
runs.py         what a run leaves behind, and how it ends; settings.py: what decides its result
examples.py     what comes before a training: data, examples, the plan of its steps
training.py     what surrounds it: optimiser, log, state, signals
rollout.py      what surrounds stage 3: the model's own CoTs, held-out records, the best weights
curves.py       what it logged, drawn; card.py: the page about a checkpoint
scores.py       what eval.py reads; report.py: what it leaves behind; page.py: report.html
intervals.py    how far to trust a score: split conformal intervals
pairs.py        pairs of responses, decided by scores that were given one by one
ranks.py        several processes under torchrun
vllm_engine.py  another engine in place of writing.py
"""
