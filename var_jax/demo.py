"""A web page that samples and edits, showing each image scale by scale as it is made.

    python -m var_jax.demo --checkpoint emoji

serves it to this machine alone, at http://127.0.0.1:7860. With --host=0.0.0.0 others may visit, who
are asked for a password: that of the environment variable VAR_JAX_PASSWORD, or else one that is
asked for here. The page loads nothing from other servers.
"""

import getpass
import ipaddress
import os
import socket
import sys
import tempfile
import threading
from typing import Any

from absl import flags

import var_jax
from var_jax import BadInput
from var_jax.tools import cli

PASSWORD = "VAR_JAX_PASSWORD"


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("checkpoint", None, 'A folder, "emoji" or "hub:d16".', required=True)
    flags.DEFINE_string("host", "127.0.0.1", "Address to serve at; 0.0.0.0: all of this machine's.")
    flags.DEFINE_integer("port", 7860, "Port to serve at; 0: any that is free.", 0, 65535)


def main(args: flags.FlagValues) -> None:
    """Loads, compiles by sampling once, and serves until Ctrl-C."""
    password = None if is_loopback(args.host) else ask_password(args.host)
    with listen(args.host, args.port) as server, tempfile.TemporaryDirectory() as folder:
        # Ahead of the import: uploads go where they end with this process, and nothing is reported.
        os.environ |= {
            "GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        try:
            from var_jax.sampling.page import web_app
        except ModuleNotFoundError as error:
            if error.name not in ("gradio", "fastapi"):  # which gradio brings
                raise
            raise BadInput("the demo needs gradio: pip install 'var_jax[demo]'.") from error
        model = var_jax.load(args.checkpoint)
        model.check_kind("the demo", "var")
        print("compiling, by sampling a first image", file=sys.stderr, flush=True)
        for cfg in (0.0, 1.5):  # without guidance and with it: two programs a scale
            for _ in model.stream(0, cfg=cfg):
                pass
        serve(web_app(model, args.checkpoint, password), server)


def serve(app: Any, listening: socket.socket) -> None:
    """Serves the page until a signal comes."""
    import uvicorn  # which gradio brings

    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    # In a thread, where it leaves signals to this one.
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    host, port = listening.getsockname()[:2]
    try:
        print(f"http://{f'[{host}]' if ':' in host else host}:{port} is ready; Ctrl-C ends it")
        sys.stdout.flush()
        thread.join()
    finally:
        server.should_exit = True
        thread.join(timeout=3)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def ask_password(host: str) -> str:
    """The password of the environment, or one that is typed. Raises: BadInput without one."""
    password = os.environ.get(PASSWORD, "")
    if not password and sys.stdin.isatty():
        password = getpass.getpass(f"password that visitors of {host} are asked for: ")
    if not password:
        raise BadInput(
            f"--host={host} lets other machines in, which takes a password: set {PASSWORD}."
        )
    return password


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises: BadInput if the address or the port cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        why = (getattr(error, "strerror", "") or str(error)).lower()
        raise BadInput(f"--host={host} --port={port} cannot be served at: {why}.") from error


if __name__ == "__main__":
    cli.run(main, define_flags)
