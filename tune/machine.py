"""Adjustments of the environment that Ray, MLflow and other libraries need.

Common causes of trouble are a temporary folder with a long path, a user without a home folder, and a proxy that also
applies to loopback addresses. Without these adjustments, each causes a library to raise or a request to hang.
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
"""Longest suffix that Ray appends to its folder in the path of a socket."""
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""Largest length of a socket's path in bytes."""
_LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1", "[::1]")

# ----------------------------------------------------------------------------
# Folders


def ray_folder() -> Path:
    """The folder for the sockets and logs of a local Ray: Ray's default if it is usable, otherwise a private folder.

    The folder is not created, see `made`.

    Raises:
        UserError: no writable folder has a short enough path.
    """
    usual = Path(os.environ.get("RAY_TMPDIR") or _temporary()).absolute() / "ray"
    if fits(usual) and _can_be_made(usual):
        return usual
    own = next((folder for folder in (place / "ray" for place in _own_places()) if fits(folder)), None)
    if own is None:
        raise UserError(
            f"Ray keeps sockets in a folder, and the path {usual} is too long for them (at most {_SOCKET_BYTES} bytes "
            "including the socket's name), or not writable: set RAY_TMPDIR to a folder of yours with a short path."
        )
    return own


def made(folder: Path) -> Path:
    """Return the folder, after creating it with access for this user only if it is one of `_own_places`."""
    if folder.parent in _own_places():
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _temporary() -> str:
    return os.environ.get("TMPDIR") or "/tmp" if sys.platform.startswith("linux") else "/tmp"  # noqa: S108


def fits(folder: Path) -> bool:
    """Whether the paths of Ray's sockets in a folder are short enough for the operating system."""
    return len(os.fsencode(str(folder) + _LONGEST_SOCKET)) <= _SOCKET_BYTES


def _can_be_made(folder: Path) -> bool:
    """Whether a folder exists and is writable, or can be created."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _own_places() -> list[Path]:
    """Folders that exist or can be created, and that only this user can access, so their content can be trusted."""
    name, runtime = f"dxmi-{os.getuid()}", os.environ.get("XDG_RUNTIME_DIR")
    places = [Path("/tmp") / name, Path("/var/tmp") / name]  # noqa: S108  (checked)
    places += [Path(runtime) / "dxmi"] if runtime else []
    return [place for place in places if is_own(place)]


def is_own(folder: Path) -> bool:
    """Whether a folder is a real folder that only its owner, this user, can access, or can be created as such."""
    try:
        found = folder.lstat()
    except OSError:
        return folder.parent.is_dir() and os.access(folder.parent, os.W_OK | os.X_OK)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077 == 0


def give_home() -> str:
    """Set a home folder and a name for a user without an account, for this process and its children.

    Containers may run under arbitrary user ids, and PyTorch, Ray and others look up both when they are imported.

    Returns:
        A message for the user; empty if nothing was changed.

    Raises:
        UserError: no folder can serve as home.
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
    return f"HOME is not set, and the system does not know user {os.getuid()}: {home} is used as the home folder."


def _is_known() -> bool:
    import pwd  # noqa: PLC0415  (only on Unix)

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


# ----------------------------------------------------------------------------
# Proxies


def is_loopback(uri: str) -> bool:
    """Whether a server's URI is a loopback address."""
    host = urlsplit(uri).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def spare_loopback() -> None:
    """Exclude loopback addresses from all proxies, for this process and its children.

    Nothing is changed if the environment does not set a proxy.
    """
    proxies = {name.lower(): value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    spared = proxies.pop("no_proxy", "")
    names = [name.strip() for name in (os.environ.get("no_proxy") or spared).split(",") if name.strip()]
    if not any(proxies.values()) or "*" in names:
        return
    names += [name for name in _LOOPBACK if name not in names]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(names)


def asked(url: str, seconds: float) -> HTTPResponse:
    """Send a GET request and return the response; loopback addresses are reached without a proxy.

    Raises:
        OSError: there was no response in time, or an error; urllib's errors are subclasses.
    """
    opener = build_opener(ProxyHandler({})) if is_loopback(url) else build_opener()
    return cast("HTTPResponse", opener.open(url, timeout=seconds))


def on_cluster() -> bool:
    """Whether trials run on an existing Ray cluster, as determined by RAY_ADDRESS."""
    return bool(os.environ.get("RAY_ADDRESS"))
