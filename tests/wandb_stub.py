"""A W&B server on 127.0.0.1 that keeps what real clients send: online runs and `wandb sync`.

It answers the four requests that a run needs (UpsertBucket, CreateRunFiles, the file stream and
the upload of files), says what it has received of a run when asked, and {} to every other request.
No W&B code runs in it.
"""

import gzip
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY = "wandb-history.jsonl"
KEY = "local-" + "5ec2e7" * 7  # 42 characters after the dash; W&B wants at least 40


@dataclass
class Run:
    """One W&B run as the server sees it."""

    fields: dict[str, Any] = field(default_factory=dict)  # variables of UpsertBucket, merged
    lines: dict[str, dict[int, str]] = field(default_factory=dict)  # file -> line number -> line
    exit_code: int | None = None
    uploads: int = 0  # how many times a client announced the end of this run

    @property
    def config(self) -> dict[str, Any]:
        config = json.loads(self.fields["config"])
        return {key: entry["value"] for key, entry in config.items() if key != "_wandb"}

    @property
    def step_metrics(self) -> dict[str, str | None]:
        """Each defined metric, or glob, and the metric on its x axis; None: hidden, or no axis."""
        metrics = json.loads(self.fields["config"])["_wandb"]["value"]["m"]
        names = [metric.get("1") or metric["2"] for metric in metrics]
        steps = [metric.get("5") for metric in metrics]  # numbers from 1 into the same list
        return {n: None if k is None else names[k - 1] for n, k in zip(names, steps, strict=True)}

    @property
    def history(self) -> list[dict[str, Any]]:
        rows = self.lines.get(HISTORY, {})
        return [_public(json.loads(rows[number])) for number in sorted(rows)]

    @property
    def held(self) -> dict[str, Any]:
        states = {None: "running", 0: "finished"}
        n_rows = len(self.lines.get(HISTORY, {}))
        return {"historyLineCount": n_rows, "state": states.get(self.exit_code, "failed")}

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.lines["wandb-summary.json"]
        return _public(json.loads(lines[max(lines)]))


def _public(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("_")}


class Stub(ThreadingHTTPServer):
    """The server; `with Stub() as stub` serves in a thread until the block ends."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: dict[str, Run] = {}
        self.bodies: list[bytes] = []  # of every request, as they came
        self.status = 200  # of the answers to GraphQL requests
        self.stream_status = 200  # and to file streams
        self.stream_breaks_after = 0  # so many requests that bring rows: until then all is well
        self.n_with_rows = 0  # of the requests that were accepted
        self.lock = threading.Lock()
        self.errors: list[BaseException | None] = []

    def __enter__(self) -> "Stub":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # clients leave without a good-bye
            self.errors.append(error)

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            name = variables["name"]
            run = self.runs.setdefault(name, Run())
            run.fields |= {key: value for key, value in variables.items() if value is not None}
            entity = {"id": "e", "name": variables.get("entity") or "local"}
            project = {"id": "p", "name": variables["project"], "entity": entity}
            bucket = {"id": name, "name": name, "displayName": run.fields["displayName"]}
            bucket |= {"config": run.fields["config"], "project": project, **run.held}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/put"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "historyLineCount" in query:
            run = self.runs.get(variables["name"])
            return {"model": {"bucket": None if run is None else run.held}}
        return {}

    def stream(self, name: str, body: dict[str, Any]) -> None:
        run = self.runs[name]
        self.n_with_rows += HISTORY in body.get("files", {})
        for file, chunk in body.get("files", {}).items():
            lines = run.lines.setdefault(file, {})
            lines.update(enumerate(chunk["content"], start=chunk["offset"]))
        if body.get("complete"):
            run.exit_code = body["exitcode"]
            run.uploads += 1


class _Handler(BaseHTTPRequestHandler):
    server: Stub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.body()
        self.answer({})

    def do_POST(self) -> None:
        body = json.loads(self.body())
        with self.server.lock:
            if self.path.endswith("/file_stream"):
                broken = self.server.n_with_rows >= self.server.stream_breaks_after
                status = self.server.stream_status if broken else 200
                if status == 200:
                    self.server.stream(self.path.split("/")[-2], body)
                self.answer({}, status)
            else:
                data = self.server.graphql(body["query"], body.get("variables") or {})
                self.answer({"data": data}, self.server.status)

    def body(self) -> bytes:
        if self.headers["Transfer-Encoding"] == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        self.server.bodies.append(body)
        return body

    def answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the terminal quiet."""
