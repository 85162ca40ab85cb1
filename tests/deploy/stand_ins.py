"""The images that docker-compose.yml stands on, where none can be pulled: a small Debian, and on it the programs of this machine.

A stand-in keeps what the public image promises: user, folders, variables, programs, ports. Versions and size differ.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.deploy.compose import variables
from tests.servers.docker_engine import Engine, NoEngine
from tests.servers.kafka_broker import cache, jars
from tests.servers.kafka_container import copy_tree, libraries
from tests.servers.postgres import programs

_BASE: Final = "flyball-test/debian"
_PACKAGES: Final = ("ca-certificates", "python3", "python3-venv")
_LEFT_OUT: Final = (
    "var/cache/apt/*",
    "var/lib/apt/lists/*",
    "usr/share/doc/*",
    "usr/share/man/*",
    "usr/share/locale/*",
)
_OF_DEBIAN: Final = re.compile(
    r"(ld-linux|libc|libm|libpthread|libdl|librt|libresolv|libgcc_s|libstdc\+\+)[-.]"
)
"""Libraries that the small Debian has, and that fit to each other only as they come."""
_AUTHORITIES: Final = "/etc/ssl/certs/of-this-machine.pem"

_PYTHON: Final = f"""
FROM {_BASE}
RUN ln -s python3 /usr/bin/python
COPY authorities.pem {_AUTHORITIES}
ENV PIP_CERT={_AUTHORITIES} SSL_CERT_FILE={_AUTHORITIES}
"""

_KAFKA: Final = f"""
FROM {_BASE}
COPY root /
RUN ldconfig && ln -s /usr/lib/jvm/*/bin/java /usr/local/bin/java
RUN useradd --uid 1000 appuser && mkdir -p /opt/kafka/defaults /opt/kafka/mounted /opt/kafka/config /var/lib/kafka/data
COPY libs /opt/kafka/libs
COPY run.sh /opt/kafka/run.sh
COPY log4j2.yaml tools-log4j2.yaml server.properties /opt/kafka/defaults/
RUN chown -R appuser /opt/kafka/config /var/lib/kafka
VOLUME /var/lib/kafka/data
USER appuser
ENTRYPOINT ["/bin/bash", "/opt/kafka/run.sh"]
"""
_KAFKA_RUN: Final = """
set -e
java -XX:TieredStopAtLevel=1 -cp '/opt/kafka/libs/*' kafka.docker.KafkaDockerWrapper setup --default-configs-dir /opt/kafka/defaults \\
  --mounted-configs-dir /opt/kafka/mounted --final-configs-dir /opt/kafka/config
exec java -XX:TieredStopAtLevel=1 $KAFKA_HEAP_OPTS -cp '/opt/kafka/libs/*' kafka.Kafka /opt/kafka/config/server.properties
"""
_KAFKA_LOGGING: Final = "Configuration:\n  Appenders: {}\n  Loggers:\n    Root:\n      level: ERROR\n"

_POSTGRES: Final = f"""
FROM {_BASE}
COPY root /
RUN ldconfig && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/ && useradd postgres && mkdir -p /var/lib/postgresql/data /run/postgresql \
 && chown postgres /var/lib/postgresql/data && chmod 3777 /run/postgresql
COPY run.sh /run.sh
VOLUME /var/lib/postgresql/data
ENTRYPOINT ["/bin/bash", "/run.sh"]
"""
_POSTGRES_RUN: Final = """
set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  initdb -D "$PGDATA" -U "$POSTGRES_USER" --auth-local=trust --auth-host=scram-sha-256 --pwfile=<(printf %s "$POSTGRES_PASSWORD") -E UTF8 --locale=C.UTF-8
  echo 'host all all all scram-sha-256' >> "$PGDATA/pg_hba.conf"
  pg_ctl -D "$PGDATA" -o "-c listen_addresses=''" -w start
  createdb -U "$POSTGRES_USER" "$POSTGRES_DB"
  pg_ctl -D "$PGDATA" -w stop
fi
exec postgres -D "$PGDATA" -c 'listen_addresses=*' -c fsync=off
"""

_PROMETHEUS: Final = f"""
FROM {_BASE}
COPY root /
RUN mkdir /prometheus && chown nobody /prometheus
VOLUME /prometheus
USER nobody
ENTRYPOINT ["/bin/prometheus"]
"""


def prepare(own: Engine) -> dict[str, str]:
    """Sees to it that the engine has the images; gives the variables of docker-compose.yml that name them. Raises: NoEngine."""
    names = {variable: variables()[variable] for variable in _MAKERS}
    with contextlib.suppress(NoEngine):
        for name in names.values():
            if not own.has_image(name):
                own.docker("pull", "-q", name)
        return names
    _import_base(own)
    with tempfile.TemporaryDirectory(prefix="flyball-images-") as folder:
        return {variable: make(own, Path(folder)) for variable, make in _MAKERS.items()}


def _python(own: Engine, folder: Path) -> str:
    found = (
        os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt"
    )
    return _build(own, folder / "python", _PYTHON, {"authorities.pem": Path(found).read_text()})


def _kafka(own: Engine, folder: Path) -> str:
    java = _program("java").resolve()
    _take(folder / "kafka", [java], [java.parent.parent])
    shutil.copytree(jars(), folder / "kafka/libs")
    files = {
        "run.sh": _KAFKA_RUN,
        "log4j2.yaml": _KAFKA_LOGGING,
        "tools-log4j2.yaml": _KAFKA_LOGGING,
        "server.properties": "log.dirs=/tmp/kafka\n",
    }
    return _build(own, folder / "kafka", _KAFKA, files)


def _postgres(own: Engine, folder: Path) -> str:
    bin_folder = programs()
    shared = Path("/usr/share/postgresql") / bin_folder.parent.name
    _take(folder / "postgres", list(bin_folder.iterdir()), [bin_folder.parent, shared])
    return _build(own, folder / "postgres", _POSTGRES, {"run.sh": _POSTGRES_RUN})


def _prometheus(own: Engine, folder: Path) -> str:
    _take(folder / "prometheus", [_program("prometheus"), _program("promtool")], [])
    return _build(own, folder / "prometheus", _PROMETHEUS, {})


_MAKERS: Final = {
    "PYTHON_IMAGE": _python,
    "KAFKA_IMAGE": _kafka,
    "POSTGRES_IMAGE": _postgres,
    "PROMETHEUS_IMAGE": _prometheus,
}


def _program(name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise NoEngine(f"no image can be pulled, and making one needs {name}, which is not installed")
    return Path(found)


def _take(context: Path, found: list[Path], folders: list[Path]) -> None:
    """Programs and folders of this machine at the places that they have here, with the libraries that they load."""
    root = context / "root"
    for folder in folders:
        copy_tree(folder, root, leave_out=("jmods", "src.zip", "demo", "man", "docs", "bitcode", "llvmjit*"))
    modules = [m for folder in folders for m in folder.rglob("*.so") if not m.name.startswith("llvmjit")]
    needed = {x for x in libraries([*found, *modules]) if not _OF_DEBIAN.match(x.name)}
    for file in {*found, *needed}:
        # Debian's /lib is a link to /usr/lib, which a folder must not take the place of.
        target = root / (file.parent.resolve() / file.name).relative_to("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)


def _build(own: Engine, context: Path, dockerfile: str, files: Mapping[str, str]) -> str:
    context.mkdir(exist_ok=True)
    for name, text in {"Dockerfile": dockerfile, **files}.items():
        (context / name).write_text(text)
    name = f"flyball-test/{context.name}"
    own.docker("build", "-q", "-t", name, str(context))
    return name


# --- Debian --------------------------------------------------------------------------------------------------------


def _import_base(own: Engine) -> None:
    command = [
        "docker",
        "import",
        "-c",
        "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8",
    ]
    with _archive().open("rb") as archive:
        done = subprocess.run(
            [*command, "-", _BASE], stdin=archive, env=own.environ, capture_output=True, text=True
        )
    if done.returncode:
        raise NoEngine(f"docker import: {done.stderr[-500:]}")


def _archive() -> Path:
    """The small Debian as tar, made once in the developer's cache folder."""
    where = _release()
    path = cache() / f"debian-{zlib.crc32(repr((where, _PACKAGES, _LEFT_OUT)).encode()):08x}.tar"
    if path.exists():
        return path
    for program in ("debootstrap", "tar"):
        if shutil.which(program) is None:
            raise NoEngine(f"no image can be pulled, and making one needs {program}, which is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _make_archive(path, *where)
    return path


def _make_archive(path: Path, release: str, mirror: str) -> None:
    with tempfile.TemporaryDirectory(prefix="flyball-debian-") as root:
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", release, root, mirror],
            capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode:
            raise NoEngine(f"debootstrap: {made.stdout[-1000:]}{made.stderr[-500:]}")
        part = path.with_suffix(".part")
        packed = subprocess.run(
            ["tar", "-C", root, *(f"--exclude=./{name}" for name in _LEFT_OUT), "-cf", str(part), "."],
            capture_output=True, text=True,
        )  # fmt: skip
        if packed.returncode:
            raise NoEngine(f"tar: {packed.stderr[-500:]}")
        part.rename(path)


def _release() -> tuple[str, str]:
    """This machine's Debian and the mirror that its own package sources name."""
    if shutil.which("apt-get") is None:
        raise NoEngine("no image can be pulled, and this machine is no Debian to make one of")
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI) $(COMPONENT)", "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for line in listed.splitlines():
        codename, mirror, component = line.split()
        if component == "main" and "-" not in codename:
            return codename, mirror
    raise NoEngine("no image can be pulled, and this machine's package sources name no Debian")
