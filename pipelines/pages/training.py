"""report.html of a training: curves, what it took, the first filters as the paper's Figure 4 shows them, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import cv2
import markupsafe
import numpy as np
import numpy.typing as npt

from models.i3d import I3D
from pipelines import records, storage
from pipelines.errors import DataError
from pipelines.pages import plotting
from pipelines.pages.base import make_environment, put_page
from pipelines.pages.preview import colour_flow
from pipelines.training.config import INITIAL, SCORE
from pipelines.training.records import RESULT, RUN, MetricsLog, RunRecord, RunResult, read_metrics
from pipelines.training.trained_network import load_network
from pipelines.training.weights_files import find_checkpoint

SQUARE_SIDE = 390  # px at least, of the square of one time step's filters
CURVES = (
    ("loss", "train", "loss", 1.0),
    ("top-1 of training clips, %", "train", "top1", 100.0),
    ("validation loss", "validation", "val_loss", 1.0),
    ("validation top-1, %", "validation", SCORE, 100.0),
    ("learning rate", "train", "learning_rate", 1.0),
    ("clips/s", "train", "clips_per_s", 1.0),
    ("waiting for clips, %", "train", "wait_share", 100.0),
)


def write_training_report(output: str) -> str:
    """Make report.html of a finished or unfinished run's folder; returns its URI. Raises ValueError where none is."""
    uri = storage.join(output, RUN)
    if not storage.exists(uri):
        raise DataError(f"{output} holds no run: {uri} is not there. Give the --output of jobs/train.py")
    run = records.read(uri, RunRecord)
    result_uri = storage.join(output, RESULT)
    result = records.read(result_uri, RunResult) if storage.exists(result_uri) else None
    drawn = {
        name: first_filters(uri)
        for name, uri in (("trained", find_checkpoint(output)), ("initial", storage.join(output, INITIAL)))
        if result and storage.exists(storage.join(uri, "model.json"))
    }
    filters = {name: squares for name, squares in drawn.items() if squares}
    return put_page(output, render_training(output, run, read_metrics(output), result, filters))


def render_training(
    output: str,
    run: RunRecord,
    log: MetricsLog,
    result: RunResult | None,
    filters: Mapping[str, Sequence[bytes]],
) -> str:
    """The page as HTML: what run.json, metrics.jsonl and result.json hold, and the filters, a PNG a time step."""
    return (
        make_environment()
        .get_template("training.html.j2")
        .render(
            output=output,
            run=run,
            settings=dict(sorted(run.to_json().items())),
            last=log.train[-1] if log.train else None,
            result=result,
            score=result.number(SCORE) if result else None,
            steps=int(result.number("step") or 0) if result else 0,
            failed=sum(line.failed for line in log.train),
            errors=[
                *(error for line in log.train for error in line.errors),
                *(error for line in log.validation for error in line.errors),
            ][:50],
            waiting=_mean([line.wait_share for line in log.train]),
            speed=_mean([line.clips_per_s for line in log.train]),
            plots=_plot_all(log),
            filters=filters,
        )
    )


def _plot_all(log: MetricsLog) -> dict[str, markupsafe.Markup]:
    plots = {}
    for title, kind, name, factor in CURVES:
        points = [(line.step, factor * getattr(line, name)) for line in getattr(log, kind)]
        # A run that diverged has losses that are not finite, which no axis could hold.
        values = np.array([point for point in points if math.isfinite(point[1])], np.float64)
        if len(values) > 1:
            plots[title] = markupsafe.Markup(plotting.plot_curves([(values[:, 0], values[:, 1])], y=title))
    return plots


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def first_filters(checkpoint: str) -> list[bytes] | None:
    """An I3D's conv1 filters: a PNG for each time step, with all of them in a square, as in the paper's Figure 4.

    RGB filters as colours around grey, flow filters as vectors on the colour wheel; all at one scale. None where the
    network is no I3D.
    """
    model = load_network(checkpoint).model
    if not isinstance(model, I3D):
        return None
    weights = model.trunk.Conv3d_1a_7x7.conv.weight.detach().float().numpy()  # type: ignore[union-attr, operator]
    return draw_filters(np.moveaxis(weights, 1, -1), flow=model.config.stream == "flow")


def draw_filters(filters: npt.NDArray[np.floating], *, flow: bool) -> list[bytes]:
    """Filters (N, T, H, W, 3 or 2) as T PNGs, in each of which the filters lie row by row in a square."""
    # One scale for all time steps, so that what fades along time is seen to fade.
    reach = float(np.abs(filters).max()) or 1.0
    if flow:
        images = colour_flow(filters.astype(np.float32), reach)
    else:
        images = np.rint(127.5 * (1 + filters / reach)).astype(np.uint8)
    return [_draw_square(images[:, time]) for time in range(images.shape[1])]


def _draw_square(images: npt.NDArray[np.uint8]) -> bytes:
    """Images (N, H, W, 3), row by row with transparent gaps between them, as a PNG."""
    num, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    canvas = np.zeros((rows * (height + 1) + 1, columns * (width + 1) + 1, 4), np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1) + 1, index % columns * (width + 1) + 1
        canvas[top : top + height, left : left + width, :3] = image[..., ::-1]
        canvas[top : top + height, left : left + width, 3] = 255
    scale = math.ceil(SQUARE_SIDE / canvas.shape[1])
    # INTER_NEAREST, and by a whole factor: each weight stays a square of one colour.
    scaled = cv2.resize(canvas, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    return bytes(cv2.imencode(".png", scaled)[1].tobytes())
