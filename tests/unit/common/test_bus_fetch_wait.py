"""Fetches wait shortly while things come, and longer once nothing has come for a minute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from services.common.bus.fetch_wait import QUIET_AFTER_S, FetchWait, News

DEPLOYMENTS, WORKERS = TopicPartition("deployments", 0), TopicPartition("workers", 0)


def consumer() -> AIOKafkaConsumer:
    return cast(AIOKafkaConsumer, SimpleNamespace(_fetcher=SimpleNamespace(_fetch_max_wait_ms=250)))


def wait_ms(of: AIOKafkaConsumer) -> int:
    return cast(Any, of)._fetcher._fetch_max_wait_ms  # type: ignore[no-any-return]


def said(partition: TopicPartition, *records: tuple[int, bytes]) -> Mapping[TopicPartition, Sequence[Any]]:
    return {
        partition: [
            cast(ConsumerRecord, SimpleNamespace(topic=partition.topic, offset=offset, key=key))
            for offset, key in records
        ]
    }


def test_a_fetch_waits_longer_after_a_quiet_minute_and_shortly_after_news() -> None:
    one, wait = consumer(), FetchWait(250, 500)
    wait.look(one, 100.0)
    assert wait_ms(one) == 250
    wait.look(one, 100.0 + QUIET_AFTER_S)
    assert (wait_ms(one), wait.is_quiet) == (500, True)
    wait.heard(one, 200.0)
    assert (wait_ms(one), wait.is_quiet) == (250, False)
    wait.look(one, 200.0 + QUIET_AFTER_S - 1)
    assert wait_ms(one) == 250


def test_a_consumer_that_is_new_waits_as_long_as_the_one_before() -> None:
    first, wait = consumer(), FetchWait(250, 500)
    wait.look(first, 0.0)
    wait.look(first, QUIET_AFTER_S)
    second = consumer()
    wait.look(second, QUIET_AFTER_S + 1)
    assert wait_ms(second) == 500


@pytest.mark.parametrize(
    ("after_s", "offset", "is_news"),
    [
        (1.0, 2, False),  # a heartbeat
        (60.0, 2, True),  # a worker that comes back
        (60.0, 1, False),  # the last record, read once more
    ],
)
def test_what_is_said_all_the_time_is_no_news(after_s: float, offset: int, is_news: bool) -> None:
    news = News()
    assert news.is_in(said(WORKERS, (1, b"worker-0")), 0.0)
    assert news.is_in(said(WORKERS, (offset, b"worker-0")), after_s) == is_news


def test_a_change_is_news_though_its_topic_is_checked_again_and_again() -> None:
    news = News()
    assert news.is_in(said(DEPLOYMENTS, (0, b"m"), (1, b"n")), 0.0)
    for seconds in range(2, 30, 2):
        assert not news.is_in(said(DEPLOYMENTS, (1, b"n")), float(seconds))
    assert news.is_in(said(DEPLOYMENTS, (1, b"n"), (2, b"n")), 30.0)
