"""One training step on several workers, data parallel, through Ray Train's `TorchTrainer`.

Every worker runs the step and takes its share of the rows of each batch; the first one reports and saves. Where they
are on several machines, the run folder must be on a disk that all of them see.

Each worker holds the whole model, or with `train.fsdp` a part of it (`checkpoints.in_parts`).
"""

import tempfile
from collections.abc import Callable
from threading import Thread

import ray
import ray.train
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from dream.errors import DreamError, TrainingError, one_line
from dream.pool import connect
from train.child import Report
from train.data import StepSpec

TRIES = 5
"""How often Ray Train looks for room for the workers, a minute each: a cluster that grows needs some."""


def run_on_workers(run: Callable[[StepSpec, Report], None], spec: StepSpec, report: Report) -> None:
    """Calls `run(spec, report)` on each of `spec.train.workers` workers; reports come from the first.

    Raises:
        DreamError: what the first worker that failed raised.
    """
    connect(spec.ray_address)
    on_gpu = bool(ray.cluster_resources().get("GPU"))
    lines = Queue()

    def work() -> None:
        first = ray.train.get_context().get_world_rank() == 0
        run(spec, lines.put if first else lambda line: None)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = TorchTrainer(
            work,
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=spec.train.workers, use_gpu=on_gpu),
            run_config=RunConfig(
                name="step", storage_path=scratch, failure_config=FailureConfig(controller_failure_limit=TRIES - 1)
            ),
        )
        listener = Thread(target=_listen, args=(lines, report))
        listener.start()
        try:
            trainer.fit()
        except ControllerError as error:  # before any worker began
            kind = "GPU" if on_gpu else "CPU"
            there, free = (found.get(kind, 0) for found in (ray.cluster_resources(), ray.available_resources()))
            raise TrainingError(
                f"training on several workers did not begin: {spec.train.workers} workers need a {kind} each, of "
                f"{there:g} in the cluster {free:g} are free; lower train.workers"
                + (" or engine.replicas, set engine.release, or add nodes" if spec.ray_address else "")
                + f" ({one_line(error)[:500]})"
            ) from error
        except Exception as error:  # Ray Train wraps what a worker raised in several ways
            raise cause_of(error) from error
        finally:
            lines.put(None)
            listener.join()


def _listen(lines: Queue, report: Report) -> None:
    while (line := lines.get()) is not None:
        report(line)


def cause_of(error: Exception) -> DreamError:
    """The error of ours in which a step failed, else one that says what Ray Train said."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    for _, failure in sorted(failures.items()):
        while failure is not None:
            if isinstance(failure, DreamError):
                return failure
            failure = getattr(failure, "cause", None) or failure.__cause__
    return TrainingError(f"training on several workers failed: {one_line(error)[:500]}")
