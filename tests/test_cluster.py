"""Searching and serving on Ray: the answers of one machine, whatever befalls the actors."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import local_ray
import numpy as np
import pytest
from clustered import JOBS, REPLICA, SHARD, Clients, answers, cluster_served, is_one_of, kill_one, processes, wait_for
from test_shards import WIDTH, fill, films, some_filter, some_query

from keyreel import Engine, Library
from keyreel.cluster.carried import carried, opened
from keyreel.cluster.proxy import Unavailable
from keyreel.config import ClusterConfig, LibraryConfig, ServeConfig
from keyreel.errors import Damaged, LibraryError
from keyreel.library.shards import open_tables
from keyreel.library.types import Filter
from keyreel.serve.security import ApiError

pytestmark = local_ray.WARNINGS
QUERIES = ["a man in a hat", "running water", "bicycles in a street", "a face", "a car"]
KILLS = int(os.environ.get("KEYREEL_CLUSTER_KILLS", "4"))


def test_errors_travel_whole() -> None:
    damaged = Damaged("no video", ["a: lost"], hint="verify")
    busy = ApiError(429, "busy", "too many", hint="later", headers={"Retry-After": "1"})
    for error in (damaged, busy, ValueError("k must be >= 1")):

        def fails(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            opened(pickle.loads(pickle.dumps(carried(fails))))
        assert caught.value.args == error.args
        assert vars(caught.value) == vars(error)
    assert opened(carried(lambda: 3)) == 3


@pytest.mark.parametrize("way", ["answers", "sends nothing", "sends a head", "hangs"])
def test_a_lost_replica_is_a_503(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's proxy sends nothing when the replica that was at work has died, and waits where there is none."""
    sent: list[Any] = []
    monkeypatch.setattr("keyreel.cluster.proxy.ServeConfig", lambda: ServeConfig(timeout_seconds=0.05))

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if way == "hangs":
            await asyncio.sleep(60)
        if way in ("answers", "sends a head"):
            await send({"type": "http.response.start", "status": 404, "headers": []})
        if way == "answers":
            await asyncio.sleep(0.1)  # what has begun may take its time
            await send({"type": "http.response.body", "body": b"own"})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Unavailable(proxy)({"type": "http", "method": "GET"}, None, send))
    body = b"".join(message.get("body", b"") for message in sent)
    assert sent[0]["status"] == (404 if way == "answers" else 503)
    if way == "answers":
        assert body == b"own"
    else:
        assert b'"kind": "lost"' in body
        assert (b"retry-after", b"1") in sent[0]["headers"]


def test_what_a_cluster_cannot_be() -> None:
    for wrong in ({"replicas": 0}, {"shard_cpus": 0.0}, {"shard_gpus": -1.0}):
        with pytest.raises(ValueError, match="must be in"):
            ClusterConfig(**wrong)


# --- actors -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    with local_ray.started(cpus=4) as ray:
        yield ray


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same videos in one shard and in three."""
    folder = tmp_path_factory.mktemp("cluster")
    for name, shards in (("whole", None), ("spread", 3)):
        fill(open_tables(str(folder / name), shards=shards), films(11))
    return folder / "whole", folder / "spread"


def actors_of(ray: Any, uri: Path, count: int) -> list[Any]:
    from keyreel.cluster.search import ShardActor

    kind = ray.remote(num_cpus=0.5, max_restarts=-1, max_concurrency=4)(ShardActor)
    actors = [kind.remote(str(uri), number, None, "cpu") for number in range(count)]
    ray.get([actor.ready.remote() for actor in actors])  # on a busy machine a start takes longer than a query may
    return actors


@pytest.mark.full
def test_200_queries_have_the_answers_of_one_machine(cluster: Any, spread: tuple[Path, Path]) -> None:
    from keyreel.cluster.search import ClusterLibrary

    draw, actors = np.random.default_rng(12), actors_of(cluster, spread[1], 3)
    library = ClusterLibrary(str(spread[1]), None, 3, actors.__getitem__, wait=False, seconds=60.0)
    with Library(spread[0]) as whole, library:
        for number in range(200):
            where, query, k = some_filter(draw), some_query(draw), int(draw.integers(1, 25))
            assert library.search(query, k=k, where=where) == whole.search(query, k=k, where=where), number
            if number % 4 == 0:
                found = library.search_videos(query, k=k, where=where)
                assert found == whole.search_videos(query, k=k, where=where), number
        for one, other in zip(library.scores(query, "05"), whole.scores(query, "05"), strict=True):
            np.testing.assert_array_equal(one, other)
        assert library.left_out() == []
        with pytest.raises(ValueError, match="k must be >= 1"):
            library.search(np.ones(WIDTH, np.float32), k=0)
        # What is committed meanwhile is seen by the next query.
        (record, rows) = films(13, 41)[40]
        for one in (whole, library):
            one._tables.of(record.id).put(record, rows)
        query = rows.vectors[0]
        assert library.search(query, k=9) == whole.search(query, k=9)
        assert any(hit.video_id == record.id for hit in library.search(query, k=60, where=Filter(videos=[record.id])))
    wrong = ClusterLibrary(str(spread[1]), None, 2, actors.__getitem__, wait=False, seconds=60.0)
    with pytest.raises(LibraryError, match="has 3 shards now, not 2"):
        wrong.search(query)
    for actor in actors:
        cluster.kill(actor)


@pytest.mark.full
@pytest.mark.parametrize("wait", [False, True])
def test_a_shard_that_dies_is_left_out_or_waited_for(cluster: Any, spread: tuple[Path, Path], wait: bool) -> None:
    from keyreel.cluster.search import ClusterLibrary

    uri, actors = str(spread[1]), actors_of(cluster, spread[1], 3)
    tables = open_tables(uri)
    query, lost = np.arange(1.0, 1 + WIDTH, dtype=np.float32), 1
    library = ClusterLibrary(uri, None, 3, actors.__getitem__, wait=wait, seconds=300.0)
    with Library(uri) as alone, library:
        full = alone.search(query, k=10)
        rest = [hit for hit in alone.search(query, k=500) if tables.number_of(hit.video_id) != lost]
        assert library.search(query, k=10) == full
        os.kill(cluster.get(actors[lost].process.remote())[0], signal.SIGKILL)
        seen, until = set[tuple[str, ...]](), time.monotonic() + 300
        while True:
            found = library.search(query, k=10)
            seen.add(tuple(library.left_out()))
            if library.left_out():
                assert [hit.video_id for hit in found] != [hit.video_id for hit in full]
                assert all(tables.number_of(hit.video_id) != lost for hit in found)
                assert found[0].score == rest[0].score
            else:
                assert found == full
                if wait or len(seen) == 2:
                    break
            assert time.monotonic() < until
            time.sleep(0.01)
        assert seen == ({()} if wait else {(), ("1 of 3 shards",)})
        assert cluster.get(actors[lost].process.remote())[1] < 1 << 31
    for actor in actors:
        cluster.kill(actor)


# --- the service ------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_kills_under_clients(media: Callable[[str], Path], tmp_path: Path) -> None:
    """Shard actors, replicas and the queue are killed while clients ask: every answer is right or says what it lacks,
    and every accepted job is done.
    """
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    clips = [media(name) for name in local_ray.CLIPS]
    uri = tmp_path / "library"
    with Engine.from_pretrained(device="cpu", threads=1) as engine:
        with Library(uri, engine, config=LibraryConfig(shards=3)) as library:
            library.add(clips[:3])
            right = answers(engine, library, QUERIES)
        with cluster_served(uri, "--replicas", "2", "--root", str(clips[0].parent), "--device", "cpu") as served:
            assert len(processes(served, SHARD)) == 3
            assert len(processes(served, REPLICA)) == 2
            with Clients(served, 8, QUERIES, lambda query, answer: is_one_of(right[query], answer)) as clients:
                time.sleep(2)
                for number in range(KILLS):
                    kill_one(served, (SHARD, REPLICA)[number % 2], number // 2)
                    time.sleep(2)
                until = time.monotonic() + 60
                while clients.statuses.get(200, 0) <= 50 and time.monotonic() < until:  # a busy machine answers fewer
                    time.sleep(0.1)
            assert clients.wrong == []
            assert set(clients.statuses) <= {200, 429, 503}
            assert clients.statuses[200] > 50
            assert clients.slowest < 30
            assert clients.partial
            with clips[3].open("rb") as file:
                answer = served.http.post("/api/v1/jobs", files={"file": ("water.mp4", file)})
            assert answer.status_code == 202, answer.text
            kill_one(served, JOBS, 0)
            done = wait_for(served.http, answer.json()["id"])
            assert done["state"] == "done", done
            found = served.http.get("/api/v1/search", params={"q": "running water", "k": 100}).json()
            assert found["left_out"] == []
            assert done["video"] in {hit["video_id"] for hit in found["hits"]}  # the shard has seen the commit
        with Library(uri, engine) as library:
            assert len(library.list()) == 4
            assert library.verify() == ()
