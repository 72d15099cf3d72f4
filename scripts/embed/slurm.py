"""Runs deploy/slurm/embed.sbatch on a Slurm of one node, kills a task, and compares the table.

usage: slurm.py        (as root, with Debian's slurm-wlm; a worker makes answers up)

slurmctld, slurmd and munged run with state of their own below target/embed-slurm, on loopback. The same dataset is
embedded once in one run, and once by an array of four tasks, of which one is killed (SIGKILL) while it works and sent
again alone. Every file of the two outputs must be the same to the byte.
"""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import common

FOLDER = common.ROOT / "target" / "embed-slurm"
IMAGES = 4000
SHARES = 4
VICTIM = 2


def wait(what: str, condition, seconds: float = 60.0):
    """Waits until a condition has a true value, and returns it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    sys.exit(f"slurm.py: gave up after {seconds:.0f} s: {what}")


class Cluster:
    """A Slurm of one node."""

    def __init__(self, folder: Path):
        host = socket.gethostname().split(".")[0]
        key, self.conf = folder / "munge.key", folder / "slurm.conf"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = folder / "munge.socket"
        for name in ("state", "spool"):
            (folder / name).mkdir()
        self.conf.write_text(
            f"ClusterName=check\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\nSlurmdUser=root\n"
            f"AuthType=auth/munge\nAuthInfo=socket={munge}\nCredType=cred/munge\n"
            f"SlurmctldPort={common.free_port()}\nSlurmdPort={common.free_port()}\n"
            f"StateSaveLocation={folder / 'state'}\nSlurmdSpoolDir={folder / 'spool'}\n"
            f"SlurmctldPidFile={folder / 'slurmctld.pid'}\nSlurmdPidFile={folder / 'slurmd.pid'}\n"
            f"SlurmctldLogFile={folder / 'slurmctld.log'}\nSlurmdLogFile={folder / 'slurmd.log'}\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSelectType=select/cons_tres\n"
            "SelectTypeParameters=CR_Core\nReturnToService=2\nMpiDefault=none\nJobAcctGatherType=jobacct_gather/none\n"
            f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN\n"
            f"PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4\n"
        )
        self.env = dict(os.environ, SLURM_CONF=str(self.conf))
        log = open(folder / "daemons.log", "w")
        self.daemons = []
        munged = ["/usr/sbin/munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}"]
        munged += [f"--pid-file={folder / 'munged.pid'}", f"--log-file={folder / 'munged.log'}"]
        munged += [f"--seed-file={folder / 'munged.seed'}"]
        slurmd = ["/usr/sbin/slurmd", "-D", "-N", host, "-f", str(self.conf)]
        for command in (munged, ["/usr/sbin/slurmctld", "-D", "-f", str(self.conf)], slurmd):
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log))
            if command is munged:
                wait("munged listens", munge.exists)
        wait("the node is idle", lambda: "idle" in self.run("sinfo", "--noheader", "--format=%t"))

    def run(self, *command: str, env: dict | None = None) -> str:
        ended = subprocess.run(command, env=self.env | (env or {}), capture_output=True, text=True)
        return ended.stdout

    def submit(self, script: Path, *flags: str, env: dict) -> str:
        """Sends a job, and returns its number."""
        said = self.run("sbatch", "--parsable", *flags, str(script), env=env).strip()
        if not said:
            sys.exit("slurm.py: sbatch refused the job; see target/embed-slurm")
        return said.split(";")[0]

    def has_ended(self, job: str) -> bool:
        return not self.run("squeue", "--noheader", f"--jobs={job}").strip()

    def end(self):
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def of_task(index: int) -> int | None:
    """Process of a task of the array that runs `imagegpt embed`, if there is one."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if b"embed" in command and f"SLURM_ARRAY_TASK_ID={index}".encode() in (entry / "environ").read_bytes():
                return int(entry.name)
        except (OSError, ValueError):
            continue
    return None


def digests(output: Path) -> dict[str, str]:
    """SHA-256 of every file that a reader of the table sees, by its name."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and "_imagegpt" not in path.parts]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main():
    for program in ("/usr/sbin/slurmctld", "/usr/sbin/slurmd", "/usr/sbin/munged"):
        if not Path(program).exists():
            sys.exit(f"slurm.py: {program} is missing; install Debian's slurm-wlm and munge")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    images = FOLDER / "images"
    images.mkdir()
    png = common.picture(0)
    for n in range(IMAGES):
        (images / f"{n:05}.png").write_bytes(png)
    worker = common.Worker("--model", str(common.ROOT / "models" / "untrained"), "--fake-engine", "2ms+1ms")
    cluster = None
    try:
        endpoint = worker.url
        base = [str(common.PROGRAM), "embed", str(images), "--endpoint", endpoint, "--part-items", "100"]
        subprocess.run([*base, "--output", str(FOLDER / "whole")], check=True, capture_output=True)
        cluster = Cluster(FOLDER)
        output = FOLDER / "shared"
        env = {"INPUT": str(images), "OUTPUT": str(output), "ENDPOINT": endpoint, "SHARES": str(SHARES)}
        env |= {"IMAGEGPT": str(common.PROGRAM), "IMAGEGPT_PART_ITEMS": "100"}
        script = common.ROOT / "deploy" / "slurm" / "embed.sbatch"
        flags = (f"--output={FOLDER}/task-%A-%a.log", "--oversubscribe")
        job = cluster.submit(script, *flags, "--no-requeue", env=env)
        victim = wait("the task to be killed works", lambda: of_task(VICTIM))
        journal = output / "_imagegpt" / "journal"
        wait("a part is done", lambda: journal.is_dir() and any(journal.iterdir()))
        os.kill(victim, signal.SIGKILL)
        wait("the array has ended", lambda: cluster.has_ended(job), 300)
        finish = [str(common.PROGRAM), "embed", "--finish", "--output", str(output)]
        if subprocess.run(finish, capture_output=True).returncode == 0:
            sys.exit("slurm.py: the killed task was done already; nothing was tried")
        again = cluster.submit(script, *flags, f"--array={VICTIM}", env=env)
        wait("the task has ended", lambda: cluster.has_ended(again), 300)
        subprocess.run(finish, check=True, capture_output=True)
        whole, shared = digests(FOLDER / "whole"), digests(output)
        if whole != shared:
            differ = sorted(name for name in whole.keys() | shared.keys() if whole.get(name) != shared.get(name))
            sys.exit(f"slurm.py: these files differ: {', '.join(differ[:10])}")
        version = cluster.run("sinfo", "--version").strip()
        print(f"{version}: an array of {SHARES} tasks embedded {IMAGES} images; task {VICTIM} was killed and sent again")
        print(f"all {len(whole)} files are those of one run, to the byte")
    finally:
        if cluster:
            cluster.end()
        worker.kill()


if __name__ == "__main__":
    main()
