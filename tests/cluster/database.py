"""MariaDB and slurmdbd on loopback, so that sacct is real (`slurmdbd.conf(5)`)."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.service import Service, accepts, call
from tests.cluster.slurm import munge_socket

USER = "mysql"


def database(directory: Path, port: int, env: Mapping[str, str]) -> Service:
    """mariadbd in its own data directory, with the account that slurmdbd uses; creates the system tables (~1 s)."""
    home = directory / "mysql"
    temporary = home / "tmp"
    for path in (home, temporary):
        path.mkdir(mode=0o700)
        shutil.chown(path, USER, USER)
    env = {**env, "TMPDIR": str(temporary)}  # a server that starts in /tmp deletes the temporary tables of the others
    password = directory / "database.password"
    password.touch(mode=0o600)
    password.write_text(secrets.token_hex(16))
    init = home / "init.sql"
    init.write_text(
        f"CREATE USER IF NOT EXISTS slurm@127.0.0.1 IDENTIFIED BY '{password.read_text()}';\n"
        f"CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED BY '{password.read_text()}';\n"
        "GRANT ALL ON slurm_acct_db.* TO slurm@127.0.0.1;\nGRANT ALL ON slurm_acct_db.* TO slurm@localhost;\n"
    )
    shutil.chown(init, USER, USER)
    data = home / "data"
    call(
        ["mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={USER}", "--skip-test-db"],
        env=env,
        timeout=300,
    )
    return Service(
        name="mariadbd",
        argv=[
            "mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={home}/socket", f"--pid-file={home}/pid",
            "--bind-address=127.0.0.1", f"--port={port}", f"--init-file={init}", "--skip-log-bin",
            "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900", "--skip-name-resolve",
        ],
        env=env,
        log=directory / "log" / "mariadbd.out",
        ready=lambda: accepts(port),
        timeout=300,
        user=USER,
    )  # fmt: skip


def accounting(directory: Path, *, port: int, database_port: int, env: Mapping[str, str], extra: str) -> Service:
    """slurmdbd; the cluster registers itself when slurmctld connects. `extra`: one more line of slurmdbd.conf."""
    conf = directory / "slurmdbd.conf"
    conf.touch(mode=0o600)  # slurmdbd refuses a file that others may read: it holds a password
    conf.write_text(
        f"AuthType=auth/munge\nAuthInfo=socket={munge_socket(directory)}\n"
        f"DbdHost={socket.gethostname().partition('.')[0]}\nDbdAddr=127.0.0.1\nDbdPort={port}\nSlurmUser={_me()}\n"
        "StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\n"
        f"StoragePort={database_port}\nStorageUser=slurm\nStoragePass={(directory / 'database.password').read_text()}\n"
        f"StorageLoc=slurm_acct_db\nLogFile={directory}/log/slurmdbd.log\nPidFile={directory}/slurmdbd.pid\n{extra}\n"
    )
    return Service(
        name="slurmdbd",
        argv=["slurmdbd", "-D"],
        env=env,
        log=directory / "log" / "slurmdbd.out",
        ready=lambda: accepts(port),
        timeout=300,
    )


def _me() -> str:
    return pwd.getpwuid(os.getuid()).pw_name
