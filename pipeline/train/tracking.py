"""Training curves to TensorBoard, MLflow and Weights & Biases, by Ray Tune's own callbacks; see `track` in the config.

TensorBoard's event files are written to `train/tune/<arm>/` in the run folder. In MLflow each arm is a run, of an experiment that
is named after the arms' folder, with the arm's init, learning rate and seed as parameters; in Weights & Biases likewise, of a
group with that name, and with WANDB_MODE=offline in `wandb/` of the working folder or of WANDB_DIR, for `wandb sync`. The steps
are optimizer steps, but that the evaluation before the first one is drawn at 1; Weights & Biases counts evaluations, and has the
optimizer steps as `step`.
"""

import os
from importlib.util import find_spec

from ray import tune
from ray.tune.logger import TBXLoggerCallback

from pipeline.config import TrackConfig
from pipeline.core.errors import InputError, first_line

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
"""What each key of the config needs."""

NO_SERVER = ("offline", "disabled")
"""Values of WANDB_MODE."""

LONGEST_GROUP = 128
"""Characters that Weights & Biases takes for a name."""


def check(track: TrackConfig) -> None:
    """See that what is asked for can be had, before anything is spent.

    Raises:
        InputError: a package is missing, or a tracking server does not answer, or does not let us in.
    """
    for key, package in PACKAGES.items():
        if getattr(track, key) and find_spec(package) is None:
            raise InputError(f"install {package} to use track.{key}: pip install '.[track]'")
    if track.mlflow:
        _ask_mlflow(track.mlflow)
    if track.wandb:
        _ask_wandb(track.wandb)


def callbacks(track: TrackConfig, experiment: str) -> list[tune.Callback]:
    """The callbacks that write the curves; `experiment` is the name for MLflow's experiment and the group of W&B."""
    # Tune would write TensorBoard's files, and CSV and JSON beside, unasked.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    chosen: list[tune.Callback] = [TBXLoggerCallback()] if track.tensorboard else []
    if track.mlflow:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        chosen.append(MLflowLoggerCallback(track.mlflow, experiment_name=experiment))
    if track.wandb:
        from ray.air.integrations.wandb import WandbLoggerCallback

        # Ray's actor works in a folder that goes with the session, and the cluster may have another environment than the driver.
        here = {"mode": os.environ.get("WANDB_MODE"), "dir": os.environ.get("WANDB_DIR", os.getcwd())}
        chosen.append(WandbLoggerCallback(track.wandb, group=experiment[-LONGEST_GROUP:], **here))
    return chosen


def _ask_mlflow(uri: str) -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
    from mlflow import MlflowClient

    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # each kind of store raises its own
        raise InputError(f"track.mlflow: {uri}: cannot be used ({str(error).splitlines()[0]})") from error


def _ask_wandb(project: str) -> None:
    import wandb

    try:
        wandb.Settings(project=project)
        ready = os.environ.get("WANDB_MODE") in NO_SERVER or wandb.login(prompt=False, verify=True)
    except wandb.Error as error:
        raise InputError(f"track.wandb: {project}: cannot be used ({first_line(error)})") from error
    if not ready:
        raise InputError("track.wandb: there is no key: set WANDB_API_KEY, or WANDB_MODE=offline")
