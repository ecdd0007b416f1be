"""The client of docs/serving.md: the ids it sends are those of training, and what it makes of the answers."""

import json
import math
import runpy
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

from tract.encode import encode_prefix, score_tokens
from tract.records import Grid
from tract.text import encode_prompt


def test_two_requests_make_a_prediction(lab, tiny_tokenizer, monkeypatch):
    grid = Grid()
    _, score_ids = score_tokens(tiny_tokenizer, grid)
    logprobs = {
        f"token_id:{id}": math.log(p) for id, p in zip(score_ids, [0.1, 0.2, 0.1, 0.4, 0.1], strict=True)
    }
    written = {"text": "this answer is good ", "stop_reason": "So the overall score is"}
    answers = [written, {"logprobs": {"top_logprobs": [logprobs | {"token_id:0": math.log(0.1)}]}}]
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [answers[len(asked) - 1]]}).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    folder = lab.checkpoint(tiny_tokenizer)
    arguments = {"grid": str(grid), "suffix": grid.suffix, "model": "seed"}
    (folder / "run.json").write_text(json.dumps({"arguments": arguments}))
    data = lab.write("one.jsonl", lab.rows[:1])
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(sys, "argv", ["serve_client", address, str(folder), str(data)])
    runpy.run_module("docs.serve_client", run_name="__main__")
    server.shutdown()
    row = json.loads(lab.capsys.readouterr().out)
    ids = encode_prompt(tiny_tokenizer, lab.rows[0]["prompt"])
    assert [request["prompt"] for request in asked] == [
        ids,
        encode_prefix(tiny_tokenizer, ids, "this answer is good", grid),
    ]
    assert asked[0]["stop"] == "So the overall score is" and asked[1]["logprob_token_ids"] == score_ids
    assert row["prediction"] == 2.9  # 1 · .1 + 2 · .2 + …
    assert row["decoded"] == 4 and row["finished"] == [True]
