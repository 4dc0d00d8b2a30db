"""From captured scontrol output of 22.05.8 and 24.11.5 to what it means for a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import SchedulerUnavailable
from orchestrator.operations.checkup import examine
from orchestrator.operations.checkup.accounting import accounting_findings
from orchestrator.operations.checkup.findings import Level
from orchestrator.operations.checkup.scheduler import chosen_partitions, save_seconds, scheduler_findings
from orchestrator.operations.checkup.slurm_text import (
    Accounting,
    ClusterAnswers,
    parse_config,
    parse_table,
    requeue_delay_s,
    seconds,
)
from tests.unit.operations.checkup.given import cluster, target, words

QOS = parse_table(
    "Name|GraceTime|PreemptMode|Preempt|MaxWall|MaxJobsPU\n"
    "normal|00:00:00|cluster||| \n"
    "low|00:01:30|requeue||2-00:00:00|4\n"
    "urgent|00:00:00|cluster|low,normal||\n"
)
ASSOCIATIONS = parse_table(
    "Account|Partition|QOS|MaxJobs|MaxWall|Def QOS\nlab||low,normal|10|1-00:00:00|low\nteach||normal||||\n"
)


def with_accounting(answers: ClusterAnswers, enforce: str = "none") -> ClusterAnswers:
    config = {
        **answers.config,
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageEnforce": enforce,
    }
    tables = Accounting(ASSOCIATIONS, {row["Name"]: row for row in QOS})
    return replace(answers, config=config, accounting=tables)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5 sec", 5),
        ("20", 20),
        ("00:01:30", 90),
        ("1-00:00:00", 86400),
        ("UNLIMITED", None),
        ("NONE", None),
        ("", None),
        (None, None),
        ("(null)", None),
        ("soon", None),
    ],
)
def test_times_as_slurm_writes_them(text: str | None, value: int | None) -> None:
    assert seconds(text) == value


def test_a_value_may_hold_equal_signs() -> None:
    assert parse_config("AuthInfo = socket=/run/m,cred_expire=7\n")["AuthInfo"] == "socket=/run/m,cred_expire=7"


@pytest.mark.parametrize(("version", "delay_s"), [("22.05", 5), ("24.11", 120)])
def test_the_pause_before_a_requeued_job_starts(version: str, delay_s: int) -> None:
    assert requeue_delay_s(cluster(version).config) == delay_s


@pytest.mark.parametrize(("version", "default"), [("22.05", "low"), ("24.11", "gpu")])
def test_the_default_partition_is_examined_where_none_is_named(version: str, default: str) -> None:
    assert chosen_partitions(target(), cluster(version)) == (default,)
    assert chosen_partitions(target(partitions=("a", "b")), cluster(version)) == ("a", "b")


def test_no_default_and_none_named_is_bad() -> None:
    answers = cluster("22.05", low={"Default": "NO"})
    ((level, message),) = words(scheduler_findings(target(), answers), "partition")
    assert (level, "no default partition" in message) == ("bad", True)


@pytest.mark.parametrize(
    ("partition", "config", "changes", "told", "preemption_s"),
    [
        ("low", {}, {}, "SIGTERM goes to the steps and nothing to the batch script", 20),
        ("nograce", {}, {}, "SIGTERM goes to the batch script and to the steps at once", 5),
        ("low", {"SlurmctldParameters": "enable_configless,preempt_send_user_signal"}, {}, "SIGUSR1 goes to", 20),
        ("nograce", {"SlurmctldParameters": "preempt_send_user_signal"}, {}, "SIGTERM goes to the batch script and", 5),
        ("low", {}, {"PreemptMode": "GANG,SUSPEND"}, "is not told to save, it stands still", None),
        ("low", {}, {"PreemptMode": "OFF"}, "are not preempted (PreemptMode=OFF)", None),
        ("low", {"PreemptType": "preempt/none"}, {}, "are not preempted (PreemptType=preempt/none)", None),
        ("low", {}, {"PriorityTier": "10"}, "are not preempted (no partition has a higher PriorityTier)", None),
        ("high", {}, {}, "are not preempted (PreemptMode=OFF)", None),
    ],
)  # fmt: skip
def test_who_is_told_and_how_long_a_save_may_take(
    partition: str, config: dict[str, str], changes: dict[str, str], told: str, preemption_s: int | None
) -> None:
    answers = cluster("22.05", config, **{partition: changes})
    asked = target(partitions=(partition,))
    assert told in words(scheduler_findings(asked, answers), "preemption")[0][1]
    assert save_seconds(asked, answers).as_json() == {
        "preemption": preemption_s,
        "time_limit": None,
        "requeue_by_admin": 5,
    }


def test_the_shortest_of_several_partitions_counts() -> None:
    assert save_seconds(target(partitions=("low", "nograce", "high")), cluster("22.05")).preemption == 5


def test_a_short_save_is_a_warning() -> None:
    levels = [
        level for level, _ in words(scheduler_findings(target(partitions=("nograce",)), cluster("22.05")), "save")
    ]
    assert levels == ["warn", "ok"]


@pytest.mark.parametrize(("runtime", "level"), [("docker", "bad"), ("none", "warn")])
def test_a_container_escapes_suspension(runtime: str, level: str) -> None:
    answers = cluster("22.05", low={"PreemptMode": "SUSPEND"})
    ((found, message),) = words(scheduler_findings(target(runtime=runtime), answers), "preemption")
    assert found == level
    assert ("container escapes" in message) == (runtime == "docker")


def test_a_cancelling_partition_names_those_that_requeue() -> None:
    answers = cluster("22.05", high={"PreemptMode": "REQUEUE"})
    found = [finding for finding in scheduler_findings(target(partitions=("cancel",)), answers) if finding.fix]
    assert [(finding.level, str(finding.fix).partition(": ")[2]) for finding in found] == [
        (Level.WARN, "low, nograce, high")
    ]


@pytest.mark.parametrize(
    ("time_s", "changes", "level", "words_"),
    [
        (None, {}, "ok", "gets 01:00:00 (`gpu` allows jobs up to 1-00:00:00)"),
        (7200, {}, "ok", "resources.time 02:00:00 fits"),
        (86401, {}, "bad", "is longer than `gpu` allows (1-00:00:00)"),
        (None, {"MaxTime": "UNLIMITED", "DefaultTime": "NONE"}, "ok", "has no limit"),
    ],
)
def test_wall_time_against_the_partition(time_s: int | None, changes: dict[str, str], level: str, words_: str) -> None:
    ((found, message),) = words(scheduler_findings(target(time_s=time_s), cluster("24.11", gpu=changes)), "time")
    assert found == level
    assert words_ in message


def test_a_notice_as_long_as_the_limit_is_bad() -> None:
    answers = cluster("24.11", gpu={"DefaultTime": "00:02:00"})
    assert any(
        level == "bad" and "00:02:00" in text for level, text in words(scheduler_findings(target(), answers), "save")
    )
    assert save_seconds(target(time_s=3600), answers).time_limit == 120


def test_a_partition_that_is_down_or_closed_to_the_account() -> None:
    answers = cluster("22.05", low={"State": "DOWN", "AllowAccounts": "lab,teach"})
    found = words(scheduler_findings(target(account="me"), answers), "partition")
    assert [level for level, _ in found] == ["bad", "bad"]
    assert "is DOWN" in found[0][1] and "does not take account `me`" in found[1][1]


def test_24_11_shows_how_often_a_failing_launch_is_tried() -> None:
    (_, held) = words(scheduler_findings(target(), cluster("24.11")), "requeue")
    assert "after 5 starts in a row that fail" in held[1]
    assert len(words(scheduler_findings(target(), cluster("22.05")), "requeue")) == 1
    older = cluster("22.05", {"SchedulerParameters": "bf_interval=2,max_batch_requeue=3"})
    assert "after 3 starts" in words(scheduler_findings(target(), older), "requeue")[1][1]


def test_jobrequeue_off_does_not_matter() -> None:
    ((level, message),) = words(scheduler_findings(target(), cluster("22.05", {"JobRequeue": "0"})), "requeue")
    assert level == "ok" and "counts only for jobs that do not ask" in message


@pytest.mark.parametrize(("timeout", "level"), [("300 sec", "ok"), ("7200 sec", "warn"), ("0 sec", "warn")])
def test_how_long_a_dead_node_stays_undiscovered(timeout: str, level: str) -> None:
    ((found, _),) = words(scheduler_findings(target(), cluster("22.05", {"SlurmdTimeout": timeout})), "dead node")
    assert found == level


def test_an_old_slurm_is_worth_knowing() -> None:
    ((level, _),) = words(scheduler_findings(target(), cluster("22.05", {"SLURM_VERSION": "20.11.4"})), "slurm")
    assert level == "warn"


# --- by QOS -----------------------------------------------------------------------------------------------------------
def test_preemption_by_qos_has_the_grace_of_the_qos() -> None:
    answers = with_accounting(cluster("24.11", {"SlurmctldParameters": "(null)"}))
    found = words(scheduler_findings(target(account="lab"), answers), "preemption")
    assert (
        "can be preempted by those of QOS urgent: SIGTERM goes to the steps" in found[0][1]
    )  # low, the default of lab
    assert save_seconds(target(account="lab"), answers).preemption == 90
    assert save_seconds(target(qos="normal"), answers).preemption == 30  # KillWait: it has no grace
    assert save_seconds(target(qos="urgent"), answers).preemption is None


def test_without_accounting_somebody_may_preempt() -> None:
    found = words(scheduler_findings(target(), cluster("24.11")), "preemption")
    assert "can be preempted by those of a QOS that may preempt yours" in found[0][1]


# --- accounting -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("enforce", "changes", "topic", "level", "words_"),
    [
        ("none", {}, "accounting", "ok", "your accounts: lab, teach"),
        ("none", {"account": "mine"}, "accounting", "warn", "`mine` is not one of yours"),
        ("associations", {"account": "mine"}, "accounting", "bad", "Slurm refuses it"),
        ("none", {"qos": "low"}, "qos", "ok", "low, normal"),
        ("none", {"account": "teach", "qos": "low"}, "qos", "warn", "not one of yours"),
        ("safe", {"account": "teach", "qos": "low"}, "qos", "bad", "not one of yours"),
        ("none", {"qos": "fast"}, "qos", "bad", "there is no QOS `fast`"),
        ("none", {"account": "lab"}, "limits", "ok", "at most 10 jobs at once, none longer than 1-00:00:00"),
        ("limits", {"account": "lab", "time_s": 90000}, "limits", "bad", "resources.time is 1-01:00:00"),
        ("none", {"account": "lab", "time_s": 90000}, "limits", "warn", "resources.time is 1-01:00:00"),
    ],
)  # fmt: skip
def test_accounts_qos_and_limits(enforce: str, changes: dict[str, object], topic: str, level: str, words_: str) -> None:
    answers = with_accounting(cluster("22.05"), enforce)
    found = words(accounting_findings(target(**changes), answers), topic)
    assert found[0][0] == level
    assert words_ in found[0][1]


def test_the_limits_of_the_chosen_qos_count_too() -> None:
    found = words(accounting_findings(target(account="lab", qos="low"), with_accounting(cluster("22.05"))), "limits")
    assert found[1] == ("ok", "QOS `low`: at most 4 jobs at once, none longer than 2-00:00:00 (MaxWall)")


def test_nobody_without_an_account_where_slurm_insists() -> None:
    answers = replace(with_accounting(cluster("22.05"), "associations,limits"), accounting=Accounting())
    ((level, message),) = words(accounting_findings(target(), answers), "accounting")
    assert level == "bad" and "you have no account" in message


def test_silence_and_absence_of_the_database() -> None:
    silent = replace(with_accounting(cluster("22.05")), accounting=None, accounting_error="no answer within 10 s")
    assert words(accounting_findings(target(), silent), "accounting")[0][0] == "warn"
    assert words(accounting_findings(target(), cluster("24.11")), "accounting")[0][0] == "ok"


def test_a_slurm_that_does_not_answer_is_asked_one_question() -> None:
    asked: list[Sequence[str]] = []

    def run(argv: Sequence[str], **_: Any) -> Any:
        asked.append(argv)
        raise SchedulerUnavailable("no answer within 15 s")

    answers, (finding,) = examine._ask_slurm(target(), run)
    assert (answers, finding.level, len(asked)) == (None, Level.BAD, 1)
    assert "Slurm does not answer" in finding.message
