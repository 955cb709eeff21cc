"""Checks where a study is stored and recorded, before anything is started."""

from pathlib import Path

from dxmi.errors import UserError
from tune.config.sweep import TrackingConfig
from tune.integrations.object_store import Remote
from tune.machine import is_loopback, on_cluster

_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "afs"}
_NETWORK_FUSE = (
    "fuse.sshfs",
    "fuse.s3fs",
    "fuse.gcsfuse",
    "fuse.glusterfs",
    "fuse.ceph",
    "fuse.juicefs",
    "fuse.goofys",
)
_MOUNTS = Path("/proc/mounts")


def require_fit(studies: Path, tracking: TrackingConfig, storage_path: str | None = None) -> None:
    """Check that a study can be stored and recorded where it is configured to be.

    Args:
        studies: the study's folder.
        tracking: where it is recorded.
        storage_path: where its runs are stored if not in its folder.

    Raises:
        UserError: the folder is relative on a cluster, the SQLite store would be on a network file system, the tracking
            server's address is a loopback address on a cluster, or the storage path is not usable.
    """
    if storage_path is not None:
        Remote(storage_path).require_reachable()
    kind = file_system(studies)
    if tracking.uri == "local" and is_network(kind):
        raise UserError(
            f"{studies} is on a network file system ({kind}), where SQLite's locks are unreliable: record the study "
            "on an MLflow server with tracking.uri=http://HOST:PORT, or not at all with tracking.uri=none."
        )
    if not on_cluster():
        return
    if not studies.is_absolute() and storage_path is None:
        raise UserError(
            f"--studies is {studies}: on a cluster it must be an absolute path that every node shares, since a job's "
            "own folder differs between nodes and is deleted afterwards. Alternatively, set shared storage with "
            "resources.storage_path=s3://bucket/studies."
        )
    if is_loopback(tracking.uri):
        raise UserError(
            f"tracking.uri is {tracking.uri}: on a cluster this refers to the machine on which the job's driver runs. "
            "Use the host name of the server."
        )


def file_system(folder: Path, mounts: Path = _MOUNTS) -> str:
    """Return the type of the file system that holds, or would hold, a folder; empty if unknown."""
    where, best, kind = str(folder.resolve()), "", ""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = fields[1].encode().decode("unicode_escape").rstrip("/")
        if (where == point or where.startswith(point + "/")) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def is_network(kind: str) -> bool:
    """Whether a file system of this type is on another machine."""
    return kind in _NETWORK or kind.startswith(_NETWORK_FUSE)
