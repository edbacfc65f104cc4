"""cluster.yaml against Ray's own schema, against what the jobs ask of a cluster, and under Ray's own autoscaler."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray_head import Head, run_head

from jobs import evaluate, extract_features, extract_flow, extraction, train, tune
from pipelines.clips import loader, numbered
from pipelines.datasets.catalog import SCHEMA, Catalog
from pipelines.evaluation import scoring
from pipelines.extraction import flow_pool, graph, tasks
from pipelines.extraction.plan import ExtractionSettings, make_plan
from pipelines.features.plan import TASK_BYTES
from pipelines.training import trainer
from pipelines.training.settings import PRESETS

ROOT = Path(__file__).resolve().parents[1]
NODES = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"  # whose wheel lacks its defaults
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
Resources = dict[str, float]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def test_ray_accepts_it() -> None:
    from ray.autoscaler._private import util

    prepared = util.prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    util.validate_config(prepared)


def test_the_image_has_the_ray_that_is_installed(cluster: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["docker"]["image"] == f"rayproject/ray:{pinned[1]}-py311"


def test_workers_of_each_kind_can_come_and_go(cluster: dict[str, Any]) -> None:
    workers = {name: kind for name, kind in cluster["available_node_types"].items() if name != "head"}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= cluster["max_workers"]
    assert workers["cpu_worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in workers["gpu_worker"]["node_config"]


def test_no_key_is_in_it_and_data_stays_at_home(cluster: dict[str, Any]) -> None:
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"AKIA|aws_access_key|aws_secret|SECRET", text, re.IGNORECASE)
    assert all("IamInstanceProfile" in kind["node_config"] for kind in cluster["available_node_types"].values())
    assert {"**/.git", "**/.venv", "**/out", "**/data"} <= set(cluster["rsync_exclude"])


def test_every_node_asks_for_the_token(cluster: dict[str, Any]) -> None:
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)


class Asked:
    """Stands where a graph of Ray Data begins, and keeps what each of its steps asks for."""

    def __init__(self) -> None:
        self.requests: list[Resources] = []
        self.selectors: list[dict[str, str]] = []
        self.context = SimpleNamespace(execution_options=SimpleNamespace())

    def begin(self, *given: Any, **settings: Any) -> Asked:
        if "num_cpus" in settings:
            self.map(**settings)
        return self

    def map(self, *given: Any, **settings: Any) -> Asked:
        named = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        self.selectors.append(settings.get("label_selector", {}))
        self.requests.append({named[name]: value for name, value in settings.items() if name in named and value})
        return self

    map_batches = map

    def iter_rows(self) -> Iterator[Any]:
        return iter(())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()
    for name in ("from_arrow", "from_items", "range", "read_datasource"):
        monkeypatch.setattr(ray.data, name, found.begin)
    return found


def grown(monkeypatch: pytest.MonkeyPatch, cluster: dict[str, Any], **counts: int) -> Resources:
    """Resources of a cluster of so many nodes of each type, which Ray then tells of."""
    kinds = cluster["available_node_types"]
    total = {
        name: float(sum(count * kinds[kind]["resources"].get(name, 0) for kind, count in counts.items()))
        for name in ("CPU", "GPU")
    }
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # as in a submitted job; on its own a machine gets no more than it has
    monkeypatch.setattr(ray, "cluster_resources", lambda: {name: value for name, value in total.items() if value})
    monkeypatch.setattr(ray, "nodes", list)  # all busy, and nobody is asked
    return total


def fits(request: Resources, node: Resources) -> bool:
    return all(node.get(name, 0) >= value for name, value in request.items())


GROWN = ({"cpu_worker": 1}, {"cpu_worker": 64}, {"gpu_worker": 1}, {"cpu_worker": 64, "gpu_worker": 8})


@pytest.mark.parametrize("counts", GROWN)
def test_each_step_of_an_extraction_and_an_evaluation_fits_a_node_and_features_are_placed_alike(
    cluster: dict[str, Any], asked: Asked, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int]
) -> None:
    total = grown(monkeypatch, cluster, **counts)
    flags = extract_flow.ExtractFlow(videos="videos", output="shards")
    _, placement = extraction.place(flags, "shards", lambda: total["GPU"])
    steps = graph.Steps(output="shards", settings=ExtractionSettings(), backend="cpu", kernel="", fingerprint="")
    tasks.build_graph([], steps, placement)
    if placement.flow_actors:
        asked.map(**flow_pool.actor_options(placement.gpus_per_actor))
    scorer = evaluate.make_scorer(evaluate.Evaluate(data="shards", output="evaluation", rgb="run"))
    list(scoring.score_videos(range(10), {}, scorer))  # type: ignore[arg-type]
    given = extract_features.ExtractFeatures(videos="videos", output="features", rgb="run")
    assert extraction.place(given, "features", lambda: total["GPU"]) == extraction.place(
        flags, "shards", lambda: total["GPU"]
    )
    nodes = [cluster["available_node_types"][kind]["resources"] for kind in counts]
    assert len(asked.requests) >= (3 if total["GPU"] else 2)
    assert all(any(fits(request, node) for node in nodes) for request in asked.requests), asked.requests
    assert placement.flow_actors * placement.gpus_per_actor <= total["GPU"]
    assert scorer.num_workers <= (total["GPU"] or total["CPU"])


def test_flow_on_cpus_is_computed_by_the_nodes_meant_for_it_as_many_tasks_as_cpus(
    cluster: dict[str, Any], asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a CPU extraction would start nodes with GPUs, whose processors are of another family."""
    grown(monkeypatch, cluster, head=1)
    table = pa.table({name: [] for name in SCHEMA.names}, schema=SCHEMA)
    plan = make_plan(Catalog(table, (), "none"), ExtractionSettings(), videos="v", output="shards", kernel="cpu")
    tasks.build_graph([], graph.Steps.of(plan, backend="cpu"), tasks.Placement(task_bytes=plan.task_bytes))
    ((label, condition),) = asked.selectors[-1].items()
    kinds = cluster["available_node_types"]
    assert condition == "!no"
    assert {name for name, kind in kinds.items() if kind.get("labels", {}).get(label) == "no"} == {"gpu_worker"}
    worker = kinds["cpu_worker"]["resources"]
    assert worker["CPU"] * asked.requests[-1]["memory"] <= worker["memory"]
    assert worker["CPU"] * TASK_BYTES <= worker["memory"]  # of features


@pytest.mark.parametrize("counts", GROWN)
def test_the_workers_of_a_training_fit_the_nodes_and_leave_cpus_to_decode(
    cluster: dict[str, Any], asked: Asked, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int]
) -> None:
    total = grown(monkeypatch, cluster, **counts)
    scale = train.make_scale(train.Workers())
    worker = trainer._scaling(scale).resources_per_worker
    place = "gpu_worker" if scale.use_gpu else "cpu_worker"
    node = cluster["available_node_types"][place]["resources"]
    on_a_node = int(min(node[name] / value for name, value in worker.items()))
    assert on_a_node * counts[place] >= scale.num_workers == (total["GPU"] or total["CPU"])
    to_decode = (total["CPU"] - scale.num_workers * worker["CPU"]) / scale.num_workers
    assert to_decode >= (1 if scale.use_gpu else 0.5)
    part = numbered.WorkerPart(start=0, rank=0, num_workers=scale.num_workers, batch=6, steps=10)
    loader.build_graph(SimpleNamespace(clips_per_task=lambda batch: 6), part, num_cpus=to_decode)  # type: ignore[arg-type]
    assert [request for request in asked.requests if 0 < request["CPU"] <= min(1.0, to_decode)] == asked.requests != []


@pytest.mark.parametrize("counts", GROWN)
def test_the_trials_of_a_search_fit_beside_each_other(
    cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch, counts: dict[str, int]
) -> None:
    total = grown(monkeypatch, cluster, **counts)
    config = tune.Tune(data="shards", output="sweep", settings=PRESETS["debug"], trials=10_000)
    scale, concurrent = tune.make_scale(config)
    worker = trainer._scaling(scale).resources_per_worker
    assert scale.data_cpus is not None
    assert concurrent == (total["GPU"] or total["CPU"])
    assert concurrent * (scale.num_workers * worker["CPU"] + scale.data_cpus) <= total["CPU"]
    assert concurrent * scale.num_workers * worker.get("GPU", 0) <= total["GPU"]


def test_an_empty_cluster_wants_to_be_told_what_to_wait_for(
    cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    grown(monkeypatch, cluster, head=1)
    for flags in ({}, {"num_workers": 8}, {"num_gpus": 0}):
        with pytest.raises(ValueError, match="no workers now"):
            train.make_scale(train.Workers(**flags))
    scale = train.make_scale(train.Workers(num_gpus=16))
    assert (scale.num_workers, scale.use_gpu, scale.cpus_per_worker) == (16, True, 1.0)
    scale = train.make_scale(train.Workers(num_gpus=0, num_workers=8))
    assert (scale.num_workers, scale.use_gpu, scale.cpus_per_worker) == (8, False, 0.5)


@pytest.fixture(scope="module")
def empty(cluster: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head without CPUs, as in cluster.yaml; its autoscaler starts CPU workers, of two CPUs each, on this machine."""
    home = tmp_path_factory.mktemp("home")
    kind = cluster["available_node_types"]["cpu_worker"]
    workers = {
        "resources": {"CPU": 2},
        "node_config": {},
        "min_workers": 0,
        "max_workers": kind["max_workers"],
    }
    head = {"resources": cluster["available_node_types"]["head"]["resources"], "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "test",
        "max_workers": 1,
        "idle_timeout_minutes": 10,
        "provider": {"type": "external", "module": NODES, "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID},
        "available_node_types": {"cpu_worker": workers, "ray.head.default": head},
        "head_node_type": "ray.head.default",
        **{f"{name}_commands": [] for name in COMMANDS},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with run_head(home, "--num-cpus=0", autoscaler=config, **environment) as found:
        yield found


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_on_an_empty_cluster_a_training_asks_how_many_workers(empty: Head, motion_shards: str, tmp_path: Path) -> None:
    flags = ("--stream", "flow", "--preset", "debug", "--data", motion_shards, "--output", str(tmp_path / "run"))
    status, text = empty.submit("jobs/train.py", *flags)
    assert status == 1
    assert "ray         a cluster of 1 node, 0 CPUs, 0 GPUs; tasks wait for workers to come" in text
    assert "error: the cluster has no workers now" in text
    assert "Traceback" not in text


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_on_an_empty_cluster_an_extraction_makes_workers_come(empty: Head, motion_shards: str, tmp_path: Path) -> None:
    made, shards = Path(motion_shards), tmp_path / "shards"
    flags = ("--short-side", "40", "--videos-per-shard", "5", "--annotations", str(made.parent / "list.csv"))
    words = ("jobs/extract_flow.py", *flags, "--videos", str(made.parent / "videos"), "--output", str(shards))
    status, text = empty.submit(*words)
    assert status == 0, text
    assert "ray         a cluster of 1 node, 0 CPUs, 0 GPUs; tasks wait for workers to come" in text
    for path in sorted(made.glob("shards/*")):
        assert (shards / "shards" / path.name).read_bytes() == path.read_bytes()
