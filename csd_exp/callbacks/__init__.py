"""What a run shows and keeps while it runs: pictures, metrics, speed, checkpoints, provenance."""

from csd_exp.callbacks.checkpoint import CheckpointFiles as CheckpointFiles
from csd_exp.callbacks.checkpoint import LastCheckpoint as LastCheckpoint
from csd_exp.callbacks.credentials import ContentCredentials as ContentCredentials
from csd_exp.callbacks.interruption import Interruption as Interruption
from csd_exp.callbacks.media import Media as Media
from csd_exp.callbacks.memory import Memory as Memory
from csd_exp.callbacks.metrics import Metrics as Metrics
from csd_exp.callbacks.progress import Progress as Progress
from csd_exp.callbacks.provenance import Provenance as Provenance
from csd_exp.callbacks.throughput import Throughput as Throughput
