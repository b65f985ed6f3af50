"""What peftlab asks of a W&B server itself: whether it answers, and whether it holds a record.

W&B's client says neither. Once a server has refused rows (by 403, for one) the client drops all
that follow, ends well, and `wandb sync` marks the record as uploaded.
"""

from __future__ import annotations

import base64
import json
import netrc
import os
import ssl
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request, urlopen

from peftlab.errors import require

if TYPE_CHECKING:
    from peftlab.wandb_record import Said

ANSWER_S = 5.0  # for each answer
PAUSES_S = (0.0, 0.5, 1.0, 2.0)  # before each question after an upload
HELD = """query Held($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $name, missingOk: true) { historyLineCount state }
  }
}"""
NO_ANSWER = (OSError, HTTPException, ValueError, LookupError, TypeError)

# W&B reports its own errors to one more server; where that is out of reach, ending takes 22 s more.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


@dataclass(frozen=True)
class Held:
    """What a server holds of a run."""

    n_rows: int
    ended: bool

    def has(self, n_rows: int, ended: bool) -> bool:
        """Whether that is all of a record with so many rows, which has ended or not."""
        return self.n_rows >= n_rows and (self.ended or not ended)


NOTHING = Held(0, False)


def held(entity: str | None, project: str, name: str, seconds: float = ANSWER_S) -> Held | None:
    """Ask the server what it holds of a run; None if it knows no such run.

    entity: None stands for the key's own. seconds: how long to wait for the answer.
    Raises: OSError, HTTPException, ValueError, LookupError or TypeError if it does not say.
    """
    variables = {"project": project, "entity": entity, "name": name}
    body = json.dumps({"query": HELD, "variables": variables}).encode()
    request = Request(f"{without_user(server()).rstrip('/')}/graphql", data=body)
    request.add_header("Content-Type", "application/json")
    token = base64.b64encode(f"api:{_key()}".encode()).decode()
    request.add_unredirected_header("Authorization", f"Basic {token}")  # for this server only
    with urlopen(request, timeout=seconds) as answer:
        model = json.load(answer)["data"]["model"]
    bucket = None if model is None else model["bucket"]
    if bucket is None:
        return None
    return Held(int(bucket["historyLineCount"] or 0), bucket["state"] not in ("running", "pending"))


def lacks(said: Said) -> str | None:
    """Ask the server some times what it holds of a record; return what it lacks, None if nothing.

    It is asked again because it counts the rows that have come with a delay.
    """
    lack = None
    for pause in PAUSES_S:
        time.sleep(pause)
        try:
            there = held(said.entity, said.project, said.name) or NOTHING
        except NO_ANSWER as error:
            return f"the server does not say what it holds ({first_line(error)})"
        if there.n_rows < said.n_rows:
            lack = f"the server holds {there.n_rows} of {said.n_rows} rows"
        elif said.ended and not there.ended:
            lack = "the server holds all rows, but not the end of the run"
        else:
            return None
    return lack


def server() -> str:
    """Return the address of W&B: WANDB_BASE_URL, that of W&B's settings file, or its default."""
    if os.environ.get("WANDB_BASE_URL"):
        return os.environ["WANDB_BASE_URL"]
    import wandb

    return wandb.setup().settings.base_url


def key_is_set() -> bool:
    """Whether W&B can log in without asking: by WANDB_API_KEY or an entry in netrc."""
    return _key() is not None


def answers(url: str, seconds: float) -> bool:
    """Whether anything speaks HTTP at `url` within `seconds`; an error page is an answer.

    Raises: InputError if that is no address at all.
    """
    plain = without_user(url)
    require(urlsplit(plain).scheme in ("http", "https"), "WANDB_BASE_URL", plain, "https://...")
    try:
        urlopen(plain, timeout=seconds).close()
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # W&B has its own settings for certificates
    except (OSError, HTTPException):
        return False
    return True


def without_user(url: str) -> str:
    """Return an address without the name and password that it may hold."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _key() -> str | None:
    if os.environ.get("WANDB_API_KEY"):
        return os.environ["WANDB_API_KEY"]
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not path.exists():
        return None
    host = urlsplit(server()).netloc
    # The public server's older name, under which W&B still accepts its key.
    hosts = [host, "api.wandb.ai"] if host == "api.forge.coreweave.com" else [host]
    try:
        entries = netrc.netrc(path)
    except (netrc.NetrcParseError, OSError):
        return None  # for W&B, too, an unreadable file holds no key
    found = (entries.authenticators(host) for host in hosts)
    return next((entry[2] for entry in found if entry), None)


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__
