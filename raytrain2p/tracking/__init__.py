"""Where a run is kept: its identity, its directory, MLflow, checkpoints and plots. MLflow is imported in this package alone."""

import logging
import os

# Set before any module of this package imports MLflow, which reads some of them at that moment.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# What fails stays on disk and is sent again later: MLflow's own retries take minutes, and would only hide an outage.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # one of the three stores that this package supports
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # with the password of the tracking URI
# It logs a traceback, with the points, of each error of a database that it raises as well.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
