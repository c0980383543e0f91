"""Run folders: what a job leaves on disk, and how the next job reads it.

RUN/
  config.json         the job, its arguments, the data and what it was built on
  environment.json    versions, device, commit, time
  status.json         running, finished, or refused for bad input
  log.txt
  metrics.parquet     one row an epoch
  networks/NAME/      network.json, model.safetensors, masks.safetensors; of a compiled network compiled.json,
                      graph.safetensors (public) and weights.safetensors
  checkpoint/         what an interrupted job resumes from; removed at the end
"""

from fairline.runs.data import DataSpec, keep_data
from fairline.runs.environment import environment, provenance
from fairline.runs.folder import FolderInUse, Run, difference, digest, linearized_networks
from fairline.runs.network import (
    ModelSpec,
    NetworkInfo,
    count_relus,
    load_info,
    load_network,
    save_compiled,
    save_network,
)
from fairline.weights import load_weights

__all__ = [
    "DataSpec",
    "FolderInUse",
    "ModelSpec",
    "NetworkInfo",
    "Run",
    "count_relus",
    "difference",
    "digest",
    "environment",
    "keep_data",
    "linearized_networks",
    "load_info",
    "load_network",
    "load_weights",
    "provenance",
    "save_compiled",
    "save_network",
]
