"""What of a machine's surroundings has to be put right before Ray, MLflow and others meet it.

A temporary folder with a long name, a user without a home, a proxy between a machine and itself: each of them is usual
somewhere, and ends in some library's traceback, or in a request that is never answered.
"""

import ipaddress
import os
import stat
import sys
from http.client import HTTPResponse
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from dxmi.errors import UserError

_LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10"
"""What Ray puts after its folder to name a socket."""
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""Of a socket's whole path, at most."""
_LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1", "[::1]")

# ----------------------------------------------------------------------------
# Folders


def ray_folder() -> Path:
    """Where a Ray of our own keeps its sockets and logs: Ray's usual place, or where that cannot be, one of our own.

    Nothing is made here, see `made`.

    Raises:
        UserError: there is no short folder that can be written.
    """
    usual = Path(os.environ.get("RAY_TMPDIR") or _temporary()).absolute() / "ray"
    if _fits(usual) and _can_be_made(usual):
        return usual
    own = next((folder for folder in (place / "ray" for place in _own_places()) if _fits(folder)), None)
    if own is None:
        raise UserError(
            f"Ray keeps sockets in a folder, and {usual} is too long for them ({_SOCKET_BYTES} bytes with all that "
            "stands behind it), or cannot be written: set RAY_TMPDIR to a short folder of yours."
        )
    return own


def made(folder: Path) -> Path:
    """The folder, made for this user alone if it is one of ours and is not there."""
    if folder.parent in _own_places():
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _temporary() -> str:
    return os.environ.get("TMPDIR") or "/tmp" if sys.platform.startswith("linux") else "/tmp"  # noqa: S108


def _fits(folder: Path) -> bool:
    return len(os.fsencode(str(folder) + _LONGEST_SOCKET)) <= _SOCKET_BYTES


def _can_be_made(folder: Path) -> bool:
    """Whether a folder is there and can be written, or could be made."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _own_places() -> list[Path]:
    """Folders of this user alone, which are there or can be made: nobody else can have put anything into them."""
    name, runtime = f"dxmi-{os.getuid()}", os.environ.get("XDG_RUNTIME_DIR")
    places = [Path("/tmp") / name, Path("/var/tmp") / name]  # noqa: S108  (checked)
    places += [Path(runtime) / "dxmi"] if runtime else []
    return [place for place in places if _is_own(place)]


def _is_own(folder: Path) -> bool:
    """Whether a folder is a real one of this user that nobody else may enter, or can be made so."""
    try:
        found = folder.lstat()
    except OSError:
        return folder.parent.is_dir() and os.access(folder.parent, os.W_OK | os.X_OK)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077 == 0


def give_home() -> str:
    """Give a user whom the system does not know a home folder and a name, for this process and those that it starts.

    Containers run under any number, and PyTorch, Ray and others look both up when they are imported.

    Returns:
        A sentence for the user; empty if there was nothing to do.

    Raises:
        UserError: there is no folder that could be the home.
    """
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")) and not _is_known():
        os.environ["USER"] = str(os.getuid())
    if os.environ.get("HOME") or _is_known():
        return ""
    place = next(iter(_own_places()), None)
    if place is None:
        raise UserError(f"HOME is not set, and the system does not know user {os.getuid()}: set HOME to a folder.")
    home = made(place / "home")
    os.environ["HOME"] = str(home)
    return f"HOME is not set, and the system does not know user {os.getuid()}: {home} serves as home folder."


def _is_known() -> bool:
    import pwd  # noqa: PLC0415  (Unix has it)

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


# ----------------------------------------------------------------------------
# Proxies


def is_loopback(uri: str) -> bool:
    """Whether a server's address means the machine itself."""
    host = urlsplit(uri).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def spare_loopback() -> None:
    """Keep this machine's own addresses from every proxy, for libraries and processes to come.

    Nothing is changed where the environment names no proxy.
    """
    proxies = {name.lower(): value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    spared = proxies.pop("no_proxy", "")
    names = [name.strip() for name in (os.environ.get("no_proxy") or spared).split(",") if name.strip()]
    if not any(proxies.values()) or "*" in names:
        return
    names += [name for name in _LOOPBACK if name not in names]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(names)


def asked(url: str, seconds: float) -> HTTPResponse:
    """The answer to a GET, which an address of this machine gets without a proxy.

    Raises:
        OSError: there was none in time, or it was an error; so are urllib's own.
    """
    opener = build_opener(ProxyHandler({})) if is_loopback(url) else build_opener()
    return cast("HTTPResponse", opener.open(url, timeout=seconds))


def on_cluster() -> bool:
    """Whether trials run on a Ray that is there already; everybody sees this before anything is started."""
    return bool(os.environ.get("RAY_ADDRESS"))
