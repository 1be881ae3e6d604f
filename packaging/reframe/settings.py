"""ReFrame's configuration of a machine without a scheduler, and of a Slurm: an example, and our tests'."""

ENVIRONMENTS = ["plain"]


def partition(name: str, scheduler: str, launcher: str) -> dict:
    return {"name": name, "scheduler": scheduler, "launcher": launcher, "environs": ENVIRONMENTS}


site_configuration = {
    "systems": [
        {
            "name": "site",
            "hostnames": [".*"],
            "partitions": [
                partition("here", "local", "mpirun"),
                # squeue: without accounting; with it: slurm. SITE: the launcher, srun or mpirun.
                partition("batch", "squeue", "mpirun"),
            ],
        }
    ],
    "environments": [{"name": "plain"}],
    "logging": [
        {
            "handlers$": [{"type": "stream", "name": "stdout", "level": "info", "format": "%(message)s"}],
            "handlers": [{"type": "file", "name": "reframe.log", "level": "debug", "append": False}],
        }
    ],
}
