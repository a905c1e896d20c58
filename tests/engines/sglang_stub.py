"""Stubs of SGLang: a web server in this process, and a Python environment in which it seems to be installed."""

from __future__ import annotations

import asyncio
import json
import venv
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

INFO: dict[str, Any] = {"version": "0.5.21", "context_length": 512, "max_total_num_tokens": 4096}
LOADS = {
    "loads": [
        {"num_running_reqs": 0, "num_waiting_reqs": 0, "num_used_tokens": 0, "max_total_num_tokens": 4096, "token_usage": 0.8}
    ]
}
META: dict[str, Any] = {
    "finish_reason": {"type": "length"},
    "prompt_tokens": 5,
    "cached_tokens": 0,
    "output_token_logprobs": [[-0.5, 7, None]],
    "weight_versions": [{"version": "0.0", "start": 0, "end": 1}],
}
LAUNCH_SERVER = """
import http.server, socket, sys
flags, answers = dict(zip(sys.argv[1:], sys.argv[2:])), ANSWERS

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answers.get(self.path, b"{}").replace(b"MODEL_PATH", flags["--model-path"].encode()))

    do_POST = do_GET

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer.address_family = socket.AF_INET6 if ":" in flags["--host"] else socket.AF_INET
http.server.ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
"""


def answers(**info: object) -> dict[str, bytes]:
    """What a server says that serves a Qwen2 and takes every version; ``info`` changes what it says it is."""
    return {
        "/server_info": json.dumps({**INFO, **info}).encode(),
        "/model_info": b'{"model_type": "qwen2", "model_path": "MODEL_PATH"}',
        "/v1/loads?include=core": json.dumps(LOADS).encode(),
        "/update_weights_from_disk": b'{"success": true}',
        "/metrics/": b"",
    }


@asynccontextmanager
async def answering(answers: dict[str, bytes], *, status: str = "200 OK", drip: bool = False) -> AsyncGenerator[str]:
    """The URL of a web server that gives ``answers`` by their path, ``drip``: and then endlessly more, bit by bit."""

    tasks = set[asyncio.Task[Any]]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # pyright: ignore[reportArgumentType]
        try:
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode() + answers.get(path, b"{}"))
            while drip:
                await asyncio.sleep(0.02)
                writer.write(b"\n")
                await writer.drain()
            writer.close()
            await writer.wait_closed()
        except OSError:
            pass  # the other side has had enough
        finally:
            writer.transport.abort()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def installed(path: Path, answers: dict[str, bytes] | None = None, version: str = "0.5.21") -> Path:
    """The Python of an environment with an SGLang of ``version`` that gives ``answers``, and a torch that finds no GPU."""
    venv.create(path, with_pip=False)
    (site,) = path.glob("lib/python*/site-packages")
    files = {
        f"sglang-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n",
        "sglang/launch_server.py": LAUNCH_SERVER.replace("ANSWERS", repr(answers or {})),
        "torch.py": "class cuda:\n    is_available = staticmethod(lambda: False)\n",
    }
    for name, text in files.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text, encoding="utf-8")
    return path / "bin" / "python"
