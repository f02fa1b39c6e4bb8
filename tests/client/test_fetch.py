"""A hub model becomes an ordinary folder: whole or not at all, with the digest for the policy."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.policy import Policy, load_policy
from fedqlora.engine.base import base_digest

ROOT = Path(__file__).parents[2]
COMMIT = "c0ffee" * 6 + "c0ff"
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickled",
    "modeling_tiny.py": b"print('code')",
}


class FakeHub(http.server.ThreadingHTTPServer):
    """The three requests that a download is made of, for one model."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files = dict(FILES)
        self.cut_off = False


class HubRequest(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/tests/tiny/revision/main":
            listed = [{"rfilename": name} for name in self.server.files]
            content = {"id": "tests/tiny", "sha": COMMIT, "siblings": listed}
            self._send(json.dumps(content).encode(), body)
        elif path == f"/api/models/tests/tiny/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{len(data):040x}"}
                for name, data in self.server.files.items()
            ]
            self._send(json.dumps(tree).encode(), body)
        elif path.startswith(f"/tests/tiny/resolve/{COMMIT}/"):
            name = path.rpartition("/")[2]
            if self.server.cut_off and name == "model.safetensors" and body:
                self.close_connection = True
                return
            self._send(self.server.files[name], body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{len(data):040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def fetch(
    hub: FakeHub | None, tmp_path: Path, name: str = "tests/tiny"
) -> subprocess.CompletedProcess[str]:
    port = hub.server_address[1] if hub else 9  # nobody listens there
    environment = {
        **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "client", "fetch", name, "--models", str(tmp_path / "models")]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_a_fetched_model_is_a_plain_folder_and_its_policy_lines_approve_it(
    hub: FakeHub, tmp_path: Path
) -> None:
    result = fetch(hub, tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "models" / "tests" / "tiny"
    # Neither code nor pickled weights, and nothing of the hub client's own.
    assert sorted(path.name for path in folder.rglob("*")) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in [folder, *folder.iterdir()])
    digest = base_digest(folder)
    assert f"digest: {digest}" in result.stdout
    (tmp_path / "policy.toml").write_text(result.stdout.partition("policy.toml:\n")[2])
    policy: Policy = load_policy(tmp_path / "policy.toml")
    assert policy.models.digests == (digest,)


def test_a_model_that_is_there_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path).returncode == 0
    kept = tmp_path / "models" / "tests" / "tiny" / "config.json"
    hub.files["config.json"] = b'{"model_type": "other"}'
    again = fetch(hub, tmp_path)
    assert again.returncode == 0
    assert again.stdout.startswith("found")
    assert kept.read_bytes() == FILES["config.json"]


def test_a_download_that_breaks_off_leaves_nothing(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_off = True
    result = fetch(hub, tmp_path)
    assert result.returncode == 1
    assert "tests/tiny cannot be fetched from the hub" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "models").iterdir()) == []


def test_a_model_without_safetensors_is_refused_and_leaves_nothing(
    hub: FakeHub, tmp_path: Path
) -> None:
    del hub.files["model.safetensors"]
    result = fetch(hub, tmp_path)
    assert result.returncode == 1
    assert "tests/tiny has no *.safetensors" in result.stderr
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reachable", "sentence"),
    [
        ("tests/unknown", True, "the hub has no model tests/unknown"),
        ("tests/tiny", False, "tests/tiny cannot be fetched from the hub"),
        ("../tiny", True, "'../tiny' is not a hub id"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(
    hub: FakeHub, tmp_path: Path, name: str, reachable: bool, sentence: str
) -> None:
    result = fetch(hub if reachable else None, tmp_path, name)
    assert result.returncode in (1, 2)
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list((tmp_path / "models").glob("*"))
