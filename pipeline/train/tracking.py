"""Training curves to TensorBoard and MLflow, by Ray Tune's own callbacks; see `track` in the config.

TensorBoard's event files are written to `train/tune/<arm>/` in the run folder. In MLflow each arm is a run, of an experiment that
is named after the arms' folder, with the arm's init, learning rate and seed as parameters. The steps of both are optimizer steps,
but that the evaluation before the first one is drawn at 1.
"""

import os
from importlib.util import find_spec

from ray import tune
from ray.tune.logger import TBXLoggerCallback

from pipeline.config import TrackConfig
from pipeline.core.errors import InputError

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow"}
"""What each key of the config needs."""


def check(track: TrackConfig) -> None:
    """See that what is asked for can be had, before anything is spent.

    Raises:
        InputError: a package is missing, or the tracking server does not answer.
    """
    for key, package in PACKAGES.items():
        if getattr(track, key) and find_spec(package) is None:
            raise InputError(f"install {package} to use track.{key}: pip install '.[track]'")
    if track.mlflow:
        _ask_server(track.mlflow)


def callbacks(track: TrackConfig, experiment: str) -> list[tune.Callback]:
    """The callbacks that write the curves; `experiment` is the name for MLflow."""
    # Tune would write TensorBoard's files, and CSV and JSON beside, unasked.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    chosen: list[tune.Callback] = [TBXLoggerCallback()] if track.tensorboard else []
    if track.mlflow:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        chosen.append(MLflowLoggerCallback(track.mlflow, experiment_name=experiment))
    return chosen


def _ask_server(uri: str) -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
    from mlflow import MlflowClient

    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # each kind of store raises its own
        raise InputError(f"track.mlflow: {uri}: cannot be used ({str(error).splitlines()[0]})") from error
