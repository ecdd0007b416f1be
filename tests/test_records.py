"""The record and its way into tokens, on real tokenizers with the ids spelled out."""

import copy
import json
import os
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import records
import runs
from records import SUFFIX, Grid
from runs import InputError
from stage1_train import collate

GRID = Grid()
PROMPT, COT = "Is it good?", "The answer is good."


def test_mistral_ids_labels_and_score_position(mistral_tokenizer):
    tokens = records.score_tokens(mistral_tokenizer, GRID)
    assert tokens.score_ids == [28740, 28750, 28770, 28781, 28782]
    assert tokens.suffix_ids == [1537, 272, 7544, 7420, 349, 28705]  # "So the overall score is" and a space of its own

    record = {"id": "a", "prompt": PROMPT, "cot": COT, "score": 3.67}
    example = records.encode(mistral_tokenizer, record, grid=GRID, score_ids=tokens.score_ids)
    prompt = [1, 28792, 16289, 28793, 1691, 378, 1179, 28804, 733, 28748, 16289, 28793]  # <s>[INST] Is it good? [/INST]
    target = [415, 4372, 349, 1179, 28723, 1537, 272, 7544, 7420, 349, 28705, 28781, 2]  # ..., "4", </s>
    assert example.ids == prompt + target
    assert example.start == len(prompt)
    assert example.ids[example.score_position] == 28781 and example.score == 3.67


def encoded(tokenizer, score: float = 3.67, grid: Grid = GRID):
    record = {"id": "a", "prompt": PROMPT, "cot": COT, "score": score}
    return records.encode(tokenizer, record, grid=grid, score_ids=records.score_tokens(tokenizer, grid).score_ids)


def test_llama31_ids_with_headers_and_a_system_text_that_is_always_the_same(llama31_tokenizer):
    """The template's date would change from day to day; its ids are those of 26 Jul 2024, as in Meta's own default."""
    system = [128006, 9125, 128007, 271, 38766, 1303, 33025, 2696, 25, 6790, 220, 2366, 18, 198]  # Cutting Knowledge Date: ...
    system += [15724, 2696, 25, 220, 1627, 10263, 220, 2366, 19, 271, 128009]  # Today Date: 26 Jul 2024
    user = [128006, 882, 128007, 271, 3957, 433, 1695, 30, 128009, 128006, 78191, 128007, 271]
    target = [791, 4320, 374, 1695, 13, 2100, 279, 8244, 5573, 374, 220, 19, 128009]  # ..., " ", "4", <|eot_id|>
    example = encoded(llama31_tokenizer)
    assert example.ids == [128000, *system, *user, *target]
    assert example.start == len(example.ids) - len(target)
    assert records.score_tokens(llama31_tokenizer, GRID).score_ids == [16, 17, 18, 19, 20]


def test_byte_level_ids(byte_tokenizer):
    """Each byte plus 3: text, a newline for want of a chat template, the target, end of sequence (1)."""
    target = [byte + 3 for byte in f"{COT} So the overall score is 4".encode()] + [1]
    example = encoded(byte_tokenizer)
    assert example.ids == [byte + 3 for byte in f"{PROMPT}\n".encode()] + target
    assert example.ids[example.start :] == target
    assert example.ids[example.score_position] == ord("4") + 3


def test_gpt2_ids_where_the_space_is_part_of_the_score(gpt2_tokenizer):
    example = encoded(gpt2_tokenizer)
    assert example.ids == [41, 83, 221, 73, 84, 291, 31, 199, 278, 290, 260, 291, 14, 276, 271, 275, 274, 260, 285, 0]
    assert gpt2_tokenizer.decode(285) == " 4" and example.score_position == 18


def test_prometheus_suffix(mistral_tokenizer):
    """`--suffix "[RESULT]"`: Prometheus-2 has Mistral's tokenizer and its own words before the score."""
    grid = Grid.parse("1,2,3,4,5", "[RESULT]")
    target = [415, 4372, 349, 1179, 28723, 733, 15132, 28793, 28705, 28781, 2]  # The answer is good. [RESULT] 4
    assert encoded(mistral_tokenizer, grid=grid).ids[-11:] == target
    assert records.check_record({"id": "a", "cot": f"No.{SUFFIX}5"}, grid, ("id",)) is None
    assert "holds '[RESULT]'" in records.check_record({"id": "a", "cot": "Good. [RESULT] 5"}, grid, ("id",))


@pytest.mark.parametrize("name", ["mistral_tokenizer", "llama31_tokenizer", "byte_tokenizer", "gpt2_tokenizer"])
def test_the_end_is_learned_once_even_where_padding_is_the_same_token(name, request):
    tokenizer = copy.deepcopy(request.getfixturevalue(name))
    tokenizer.pad_token = tokenizer.eos_token
    short, long = encoded(tokenizer), encoded(tokenizer)._replace(ids=[5] * 9 + encoded(tokenizer).ids)
    long = long._replace(start=short.start + 9, score_position=short.score_position + 9)
    batch = collate([short, long], pad_id=tokenizer.pad_token_id)
    assert batch["targets"].tolist().count(tokenizer.eos_token_id) == 2
    assert batch["predicts"][0].sum() == len(short.ids) - short.start


OWN = {"instruction": "Дай совет", "response": "ลองดู {x}", "rubric": {"criteria": "Useful?", "1": "No.", "5": "Yes."}}


def test_prompts_of_ones_own_are_rendered(write_jsonl):
    """The Prometheus template, with and without a reference, in any language; a line's number where there is no id."""
    path = write_jsonl("own.jsonl", [OWN | {"reference": "good one"}, OWN | {"id": "b", "rubric": "Is it useful?"}])
    first, second = records.read_records(path, grid=GRID)
    assert (first["id"], second["id"]) == ("1", "b")
    assert first["prompt"].endswith(
        "###The instruction to evaluate:\nДай совет\n\n###Response to evaluate:\nลองดู {x}\n\n"
        "###Reference Answer (Score 5):\ngood one\n\n"
        "###Score Rubrics:\n[Useful?]\nScore 1: No.\nScore 5: Yes.\n\n###Feedback:"
    )
    assert "a reference answer that gets a score of 5, and a score rubric" in first["prompt"]
    assert "eference" not in second["prompt"] and "###Score Rubrics:\nIs it useful?\n\n" in second["prompt"]
    given = write_jsonl("given.jsonl", [OWN | {"prompt": "As it is."}])
    assert records.read_records(given, grid=GRID)[0]["prompt"] == "As it is."


def test_no_cot_supervises_score_and_end_alone(mistral_tokenizer):
    record = {"id": "a", "prompt": PROMPT, "score": 5}
    ids = records.score_tokens(mistral_tokenizer, GRID).score_ids
    example = records.encode(mistral_tokenizer, record, grid=GRID, score_ids=ids, no_cot=True)
    assert example.ids[example.start :] == [28782, 2]
    assert mistral_tokenizer.decode(example.ids[-9:-2]) == "] So the overall score is "


@pytest.mark.parametrize("name", ["mistral_tokenizer", "gpt2_tokenizer", "llama3_tokenizer"])
@pytest.mark.parametrize("cot", [COT, "", "Ends in 4", "東京は良い。🙂", "line\n\nbreak ", "é" * 9])
def test_training_prefix_is_generation_prefix(request, name, cot):
    """Token for token: what scoring feeds is what training had before the score."""
    tokenizer = request.getfixturevalue(name)
    ids = records.score_tokens(tokenizer, GRID).score_ids
    for score in (1, 4, 5):
        example = records.encode(tokenizer, {"id": "a", "prompt": PROMPT, "cot": cot, "score": score}, grid=GRID, score_ids=ids)
        prompt = records.prompt_ids(tokenizer, PROMPT)
        assert records.prefix_ids(tokenizer, prompt, cot, GRID) == example.ids[: example.score_position]
        assert example.ids[: len(prompt)] == prompt


def test_score_tokens_where_the_space_melts_and_where_not(gpt2_tokenizer, llama3_tokenizer):
    melted = records.score_tokens(gpt2_tokenizer, GRID)
    assert gpt2_tokenizer.convert_ids_to_tokens(melted.score_ids) == ["Ġ1", "Ġ2", "Ġ3", "Ġ4", "Ġ5"]
    assert gpt2_tokenizer.convert_ids_to_tokens(melted.suffix_ids)[-1] == "Ġis"
    apart = records.score_tokens(llama3_tokenizer, GRID)
    assert llama3_tokenizer.convert_ids_to_tokens(apart.score_ids) == ["1", "2", "3", "4", "5"]
    assert llama3_tokenizer.convert_ids_to_tokens(apart.suffix_ids)[-1] == "Ġ"


def test_scores_that_are_not_one_token_are_named(mistral_tokenizer):
    with pytest.raises(InputError, match=r"tokenizer mistral.*'1' and '10' do not differ in exactly one token"):
        records.score_tokens(mistral_tokenizer, Grid.parse("1,5,10"))


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}[INST] {{ messages[0]['content'] }}", "[INST] {{ messages[0]['content'] }}", None]
)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_exactly_one_bos_whoever_writes_it(template, adds_bos, gpt2_tokenizer):
    tokenizer = copy.deepcopy(gpt2_tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.chat_template = template
    ids = records.prompt_ids(tokenizer, PROMPT)
    expects = adds_bos or "bos_token" in (template or "")
    assert ids.count(bos) == int(expects) and (ids[0] == bos) == expects


def test_grid_values_and_nearest_token():
    grid = Grid.parse("1=0,3=50,5=100")
    assert grid.values == (0, 50, 100) and Grid.parse(str(grid)) == grid
    assert [grid.tokens[grid.nearest(s)] for s in (0, 24.9, 25, 75, 100)] == ["1", "1", "3", "5", "5"]
    for wrong in ("1", "1,1", "3,2", "a,b", "1=nan,2=3", "1,,2"):
        with pytest.raises(InputError, match="--grid"):
            Grid.parse(wrong)


def test_long_records_are_left_out_not_cut(capsys):
    assert records.too_long({"a": 5, "b": 9, "c": 6}, 6) == {"b"}
    with pytest.raises(InputError, match="all 2 records are longer than --max-length 3"):
        records.too_long({"a": 4, "b": 9}, 3)
    runs.report([f"r{i}" for i in range(7)], "left out")
    assert capsys.readouterr().out == "7 records left out: r0, r1, r2, r3, r4, …\n"


def test_any_language_and_unknown_fields_pass_unharmed(write_jsonl, tmp_path):
    row = {"id": "ä", "prompt": "Оцени: 東京 🙂\u2028", "cot": "جيد", "score": 4.5, "mine": {"kept": [1]}}
    read = records.read_records(write_jsonl("a.jsonl", [row]), grid=GRID, need=("id", "prompt", "cot", "score"))
    runs.write_whole(tmp_path / "b.jsonl", "".join(map(runs.to_line, read)))
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    assert list(read) == [row]


def test_records_stay_in_their_file_and_a_changed_file_is_noticed(write_jsonl):
    rows = [{"id": f"r{i}", "prompt": "Very long. " * 10_000} for i in range(60)]
    path = write_jsonl("a.jsonl", rows)
    tracemalloc.start()
    read = records.read_records(path, grid=GRID)
    assert [record["id"] for record in read] == [row["id"] for row in rows] and read[-1] == rows[-1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 6e6 and peak < 2e6
    os.utime(path, ns=(0, 0))
    with pytest.raises(runs.InputError, match="was changed while it was being read"):
        read[0]


GOOD = {"id": "a", "prompt": "p", "cot": "c", "score": 4}
NEXT = GOOD | {"id": "b"}
BAD_LINES = {  # second line of a file → what the message says about it
    "not JSON": ("{oops", "not JSON"),
    "cut off": ('{"id": "b", "prompt": "p', "not JSON"),
    "trailing comma": ('{"id": "b",}', "not JSON"),
    "single quotes": ("{'id': 'b'}", "not JSON"),
    "two records": ('{"id": "b"} {"id": "c"}', "not JSON"),
    "a comment": ("# to do", "not JSON"),
    "an array": ("[1]", "a list, not a JSON object"),
    "a string": ('"text"', "a str, not a JSON object"),
    "a number": ("4", "a int, not a JSON object"),
    "null": ("null", "a NoneType, not a JSON object"),
    "broken UTF-8": (b'{"id": "\xff"}', "not JSON"),
    "UTF-16": ('{"id": "b"}'.encode("utf-16"), "not JSON"),
    "NUL bytes": (b"\x00\x00\x00", "not JSON"),
    "a raw line break in a text": (b'{"id": "b\tc"}', "not JSON"),
    "deeply nested": ("[" * 100_000 + "]" * 100_000, "not JSON"),
    "deeply nested field": ('{"id": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
    "a number of 5,000 digits": ('{"score": ' + "9" * 5000 + "}", "not JSON"),
    "empty object": ({}, "'prompt' is missing; this stage needs id, prompt, cot, score; give it whole, or as instruction"),
    "rubric a list": ({"instruction": "i", "response": "r", "rubric": ["c"], "score": 4}, "'rubric' is no text"),
    "id null": (GOOD | {"id": None}, "'id' is missing"),
    "id a number": (GOOD | {"id": 7}, "'id' is 7, not a string"),
    "id empty": (GOOD | {"id": ""}, "'id' is empty"),
    "duplicate id": (GOOD, "id 'a' was already used in line 1"),
    "no prompt": ({"id": "b", "cot": "c", "score": 4}, "'prompt' is missing"),
    "prompt null": (NEXT | {"prompt": None}, "'prompt' is missing"),
    "prompt a list": (NEXT | {"prompt": ["p"]}, "'prompt' is [\"p\"], not a string"),
    "prompt a number": (NEXT | {"prompt": 3}, "'prompt' is 3, not a string"),
    "empty prompt": (NEXT | {"prompt": ""}, "'prompt' is empty"),
    "blank prompt": (NEXT | {"prompt": " \n"}, "'prompt' is empty"),
    "half a surrogate in the prompt": (NEXT | {"prompt": "\ud800"}, "surrogate"),
    "half a surrogate in the id": (NEXT | {"id": "\udc00"}, "surrogate"),
    "half a surrogate in a field of one's own": (NEXT | {"mine": ["\ud800"]}, "surrogate"),
    "no cot": ({"id": "b", "prompt": "p", "score": 4}, "'cot' is missing"),
    "cot a number": (NEXT | {"cot": 1.5}, "'cot' is 1.5, not a string"),
    "empty cot": (NEXT | {"cot": ""}, "'cot' is empty"),
    "suffix in cot": (NEXT | {"cot": "Bad. So the overall score is 1"}, "end the CoT before it"),
    "no score": ({"id": "b", "prompt": "p", "cot": "c"}, "'score' is missing"),
    "score null": (NEXT | {"score": None}, "'score' is missing"),
    "score too high": (NEXT | {"score": 6}, "score 6 lies outside the grid"),
    "score too low": (NEXT | {"score": 0.99}, "score 0.99 lies outside the grid"),
    "score a string": (NEXT | {"score": "4"}, "'score' is \"4\", not a number"),
    "score true": (NEXT | {"score": True}, "'score' is true, not a number"),
    "score a list": (NEXT | {"score": [4]}, "'score' is [4], not a number"),
    "score NaN": ('{"id": "b", "prompt": "p", "cot": "c", "score": NaN}', "NaN is not a number"),
    "score Infinity": ('{"id": "b", "prompt": "p", "cot": "c", "score": -Infinity}', "-Infinity is not a number"),
    "score of 400 digits": ('{"id": "b", "prompt": "p", "cot": "c", "score": 1' + "0" * 400 + "}", "not a number"),
    "score huge": ('{"id": "b", "prompt": "p", "cot": "c", "score": 1e999}', "not a number"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_gets_one_line_and_exit_code_2(case, tmp_path, run_script, capsys):
    line, message = BAD_LINES[case]
    line = json.dumps(line) if isinstance(line, dict) else line
    path, out = tmp_path / "bad.jsonl", tmp_path / "out"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(SystemExit) as exit:
        run_script("stage1_train", "--data", path, "--out", out)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith(f"{path}:2: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


BAD_COTS = {
    "cots missing": ({"finished": [True]}, "only gen_cot.py adds self-generated CoTs"),
    "cots a text": ({"cots": "c", "finished": [True]}, "'cots' does not hold one entry a CoT"),
    "cots empty": ({"cots": [], "finished": []}, "'finished' does not hold one true or false a CoT"),
    "one finished for two": ({"cots": ["c", "d"], "finished": [True]}, "'cots' does not hold one entry a CoT"),
    "finished a number": ({"cots": ["c"], "finished": [1]}, "'finished' does not hold one true or false a CoT"),
    "predictions": ({"cots": ["c"], "finished": [True], "prediction": 3.0}, "these are predictions"),
}


@pytest.mark.parametrize("case", BAD_COTS)
def test_what_gen_cot_did_not_write_is_no_data_for_stage_2(case, write_jsonl, tmp_path, run_script, capsys):
    fields, message = BAD_COTS[case]
    with pytest.raises(SystemExit) as exit:
        run_script("stage2_train", "--data", write_jsonl("cots.jsonl", [GOOD | fields]), "--out", tmp_path / "out")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_what_is_odd_but_whole_is_read(tmp_path):
    """A byte order mark, Windows line ends, blank lines, a gigantic line, NUL as a character: all of it is text."""
    big = NEXT | {"prompt": "long " * 2_000_000, "mine": {"any": [None, {"depth": "\u0000"}]}}
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(big).encode())
    assert list(records.read_records(path, grid=GRID)) == [GOOD, big]


TOKENIZERS = ["mistral_tokenizer", "llama31_tokenizer", "gpt2_tokenizer", "llama3_tokenizer", "tiny_tokenizer"]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<|end|>", "<|eot_id|>", "[INST]", "[/INST]", "give me a 5 [RESULT] 5", SUFFIX, "4"]
TEXT = st.lists(st.sampled_from(SPECIAL) | st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=6).map(
    "".join
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, cot=TEXT, score=st.sampled_from([1, 3.5, 5]))
def test_no_text_becomes_a_control_token_or_moves_the_score(name, request, prompt, cot, score):
    tokenizer = request.getfixturevalue(name)
    ids = records.score_tokens(tokenizer, GRID).score_ids
    example = records.encode(tokenizer, {"id": "a", "prompt": prompt, "cot": cot, "score": score}, grid=GRID, score_ids=ids)
    plain = records.encode(tokenizer, {"id": "a", "prompt": "p", "cot": "c", "score": score}, grid=GRID, score_ids=ids)
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert [i for i in example.ids if i in control] == [i for i in plain.ids if i in control]
    if name != "tiny_tokenizer":  # whose words are few
        assert tokenizer.unk_token_id not in example.ids
    assert example.score_position == len(example.ids) - 2
    assert example.ids[example.score_position] == ids[GRID.nearest(score)]
    assert (
        records.prefix_ids(tokenizer, records.prompt_ids(tokenizer, prompt), cot, GRID) == example.ids[: example.score_position]
    )


@pytest.mark.parametrize(
    "instruction, prompt",
    [
        ("Rate.\n\n###Feedback: ", "Rate.\n\n###Feedback:"),
        ('Rate.\n###Feedback: ",\n', "Rate.\n###Feedback:"),
        (" Rate. ", "Rate."),
    ],
)
def test_clean_prompt(instruction, prompt):
    assert records.clean_prompt(instruction) == prompt


def test_clean_cot():
    assert records.clean_cot("Feedback: Fine work. So the overall score is 4. [RESULT] 4") == "Fine work."
    assert records.clean_cot("Fine work. [RESULT] Score: 4.") == "Fine work."
