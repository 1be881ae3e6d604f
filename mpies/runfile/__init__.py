"""The run file, `run.h5`. Rank 0 writes it; anybody reads it while the job runs.

    / attributes      schema_version, program, program_version, run_uuid, created_utc, model_path,
                      model_digest, parameters, dtype (of the live weights), data_digest (of the
                      task's rows), fitness, population, left_out, model_class,
                      generations_committed
    /config/000 ...   the resolved settings as YAML, one entry per start
    /start            a row per start
    /generation       a row per generation, each column a dataset of shape (rows,)
    /member           the same, of shape (rows, N): seed, sign, reward, coefficient, ...
    /evaluation       a row per evaluation and split
    /metric           a row per evaluation, split and further figure of the task
    /sample           a row per kept answer
    /prompt           a row per evaluation and prompt
    /figure /answer   what `mpies.evaluate --log` measured; only there once it did
    /generations ...  row numbers: generations, members, evaluations, metrics, samples, prompts,
                      starts, which name the dimensions of the datasets above (HDF5 dimension scales)

Only the first `generations_committed` rows of /generation and /member count: more are there, empty,
until the run has ended. Every dataset has the attributes `description` and `units`. Readers open with
`locking=False`.
"""

from mpies.runfile.reader import (
    History,
    TruncatedError,
    open_for_reading,
    path_of,
    read_history,
    refuse_unknown,
    salvage_history,
)
from mpies.runfile.schema import (
    ALL_TABLES,
    COMMAND_TABLES,
    COSINE,
    METRIC,
    RUN_FILE,
    SCHEMA_VERSION,
    TABLES,
)
from mpies.runfile.writer import RunFile

__all__ = [
    "ALL_TABLES",
    "COMMAND_TABLES",
    "COSINE",
    "METRIC",
    "RUN_FILE",
    "SCHEMA_VERSION",
    "TABLES",
    "History",
    "RunFile",
    "TruncatedError",
    "open_for_reading",
    "path_of",
    "read_history",
    "refuse_unknown",
    "salvage_history",
]
