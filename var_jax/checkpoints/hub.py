"""The official weights by name: `hub:d16` is downloaded once, checked, and converted into a cache.

Files are those of FoundationVision/var on the Hugging Face Hub (or on HF_ENDPOINT). A download that
broke off continues. What is converted lies in ~/.cache/var_jax/hub (or $XDG_CACHE_HOME/var_jax/hub)
and needs no network.
"""

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import jax
from etils import epath

from var_jax import BadInput, Failure
from var_jax.tools.files import cache_folder
from var_jax.tools.logs import progress

REPOSITORY = "FoundationVision/var"
TOKENIZER = "vae_ch160v4096z32.pth"
MODELS = {name: f"var_{name}.pth" for name in ("d16", "d20", "d24", "d30", "d36")}
RETRIES = 5  # in a row without a byte
PAUSE = 1.0  # seconds before each

Convert = Callable[[dict[str, str], epath.Path], Any]


def is_name(checkpoint: str | PurePath) -> bool:
    """Whether this is hub:NAME or hub:NAME@REVISION."""
    return str(checkpoint).startswith("hub:")


def folder(checkpoint: str | PurePath) -> epath.Path:
    """Where the export of hub:NAME is or will be.

    Raises: BadInput for an unknown name.
    """
    name, revision = parse(checkpoint)
    return epath.Path(cache()) / (name if revision == "main" else f"{name}@{revision}")


def parse(checkpoint: str | PurePath) -> tuple[str, str]:
    """Name and revision. Raises: BadInput for an unknown name."""
    name, at, revision = str(checkpoint).removeprefix("hub:").partition("@")
    if name not in MODELS or not re.fullmatch(r"[\w.-]+" if at else "", revision):
        known = ", ".join(f"hub:{name}" for name in MODELS)
        raise BadInput(
            f"{checkpoint} is not known; expected one of {known}, with @REVISION if you like."
        )
    return name, revision or "main"


def cache() -> Path:
    """The folder of converted weights and of downloads under way."""
    return cache_folder() / "hub"


def fetch(checkpoint: str | PurePath, convert: Convert) -> epath.Path:
    """The folder of the export, downloaded and converted if it is not there yet.

    `convert` makes the folder from the files of a "tokenizer" and a "transformer", whole or not at
    all. Of several processes on a machine one does it and the others wait.

    Raises:
        BadInput: the name or its revision is unknown, or huggingface_hub is not installed.
        Failure: the network, or what came over it.
    """
    target, (name, revision) = folder(checkpoint), parse(checkpoint)
    if (target / "config.json").exists():
        return target
    if jax.process_count() > 1:
        raise BadInput(
            f"{checkpoint} is not in the cache of each host yet; run once on each, by itself,"
            f" `python -c 'import var_jax; var_jax.load(\"{checkpoint}\")'`."
        )
    try:
        import huggingface_hub
        from filelock import FileLock, Timeout

        if huggingface_hub.__version__.startswith("0."):
            raise ImportError(f"huggingface_hub {huggingface_hub.__version__} is too old")
    except ImportError as error:
        raise BadInput(
            f"{checkpoint} needs huggingface_hub from 1.0 on: pip install 'var_jax[hub]'."
        ) from error
    cache().mkdir(parents=True, exist_ok=True)
    with acquire(FileLock(cache() / ".lock"), Timeout):
        if not (target / "config.json").exists():
            names = {"tokenizer": TOKENIZER, "transformer": MODELS[name]}
            paths = {part: download(file, revision) for part, file in names.items()}
            print(f"converting {MODELS[name]} into {target}", file=sys.stderr)
            convert({part: str(path) for part, path in paths.items()}, target)
            paths["transformer"].unlink()  # the tokenizer's is that of all models
    return target


def acquire(lock: Any, timeout: type[Exception]) -> Any:
    """Acquires a lock, in a `with` statement; says so if that means to wait."""
    try:
        return lock.acquire(timeout=0)
    except timeout:
        print(f"another process is downloading to {cache()}; waiting for it", file=sys.stderr)
        return lock.acquire()


def download(file: str, revision: str) -> Path:
    """A file of the repository, checked against the size and the SHA-256 that the hub states.

    Raises: Failure, also if the bytes are not those; BadInput for an unknown revision.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT") or None
    url = hf_hub_url(REPOSITORY, file, revision=revision, endpoint=endpoint)
    try:
        stated = get_hf_file_metadata(url)
        if stated.size is None or not re.fullmatch(r"[0-9a-f]{64}", stated.etag or ""):
            raise Failure(f"{url} comes without a size and a SHA-256 to check it by.")
        path = cache() / f"{stated.etag}-{file}"
        if not path.exists():
            beside = path.with_name(f".{path.name}.partial")
            receive(url, beside, stated.size)
            if (found := sha256(beside)) != stated.etag:
                beside.unlink()
                raise Failure(
                    f"{url} is damaged: its SHA-256 is {found}, the hub states {stated.etag}; the"
                    " same command downloads it again."
                )
            beside.replace(path)
        return path
    except errors.RevisionNotFoundError as error:
        raise BadInput(f"{REPOSITORY} has no revision {revision!r}.") from error
    except (BadInput, Failure):
        raise
    except Exception as error:  # of httpx, whose name depends on the version, and the hub's own
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        text = re.sub(r" for url:? .*", "", str(error).strip()) or type(error).__name__
        raise Failure(
            f"{url} cannot be downloaded: {text.splitlines()[0].rstrip('.:')}; files that you have"
            " go through `python -m var_jax.convert`."
        ) from error


def receive(url: str, path: Path, size: int) -> None:
    """Appends to `path` what it lacks of `size` bytes; a broken connection is taken up again.

    Raises: Failure if the connection breaks again and again, or there are more bytes.
    """
    print(f"downloading {url} ({size / 1e6:.0f} MB)", file=sys.stderr)
    with path.open("ab") as file, progress(size, file.tell(), "downloading") as bar:
        attempts = 0
        while (begin := file.tell()) < size:
            broken = None
            try:
                append(url, file, size, bar)
            except Exception as error:
                if not is_passing(error):
                    raise
                broken = error
            attempts = 0 if file.tell() > begin else attempts + 1
            if attempts >= RETRIES:
                raise Failure(
                    f"{url} broke off after {begin} of {size} bytes ({broken or 'none more came'});"
                    " the same command continues from there."
                ) from broken
            if file.tell() < size:
                time.sleep(PAUSE)
        if file.tell() > size:
            file.truncate(0)
            raise Failure(f"{url} has more than the {size} bytes that the hub states.")


def append(url: str, file: BinaryIO, size: int, bar: Any) -> None:
    """Appends what the server has beyond the end of `file`, until that has more than `size`."""
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers

    begin = file.tell()
    headers = build_hf_headers() | {"Range": f"bytes={begin}-", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=30) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # a server without ranges sends all
            bar.update(-begin)
            file.truncate(0)
        for chunk in response.iter_bytes():
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > size:
                return


def is_passing(error: Exception) -> bool:
    """Whether an error is of the connection, after which the same request may go well."""
    return any(cls.__name__ == "TransportError" for cls in type(error).__mro__)  # of httpx


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
