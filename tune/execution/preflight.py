"""What a study may not do on a cluster, refused before anything is started."""

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
    """Check where a study is to be kept and recorded.

    Args:
        studies: the study's folder.
        tracking: where it is recorded.
        storage_path: where its runs are kept if not in its folder.

    Raises:
        UserError: its folder is relative on a cluster, its SQLite store would be on a network file system, its tracking
            server's address means another machine on each node, or nothing can be kept at its storage path.
    """
    if storage_path is not None:
        Remote(storage_path).require_reachable()
    kind = file_system(studies)
    if tracking.uri == "local" and is_network(kind):
        raise UserError(
            f"{studies} is on a network file system ({kind}), where SQLite's locks cannot be relied on: record the "
            "study on an MLflow server, tracking.uri=http://HOST:PORT, or nowhere, tracking.uri=none."
        )
    if not on_cluster():
        return
    if not studies.is_absolute() and storage_path is None:
        raise UserError(
            f"--studies is {studies}: on a cluster name an absolute folder that every node sees, since a job's own "
            "folder differs from node to node and is deleted after it; or a place that every node reaches, by "
            "resources.storage_path=s3://bucket/studies."
        )
    if is_loopback(tracking.uri):
        raise UserError(
            f"tracking.uri is {tracking.uri}: on a cluster that is whichever machine the job's driver runs on. "
            "Name the server's own host."
        )


def file_system(folder: Path, mounts: Path = _MOUNTS) -> str:
    """The kind of file system that a folder is on or would be made on, as the system calls it; empty if unknown."""
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
    """Whether a file system of this kind lies on another machine."""
    return kind in _NETWORK or kind.startswith(_NETWORK_FUSE)
