"""What is said of a process that got no memory."""

from pathlib import Path

import pytest

from tutormax_assets.runs import memory


def groups(root: Path, cgroup: str, **limits: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for path, limit in limits.items():
        file = root / "sys/fs/cgroup" / path.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(limit)
    return root


def test_the_lowest_limit_of_the_control_groups_counts(tmp_path: Path) -> None:
    two = groups(
        tmp_path / "2",
        "0::/system.slice/tutormax.service\n",
        memory_dot_max="max\n",
        **{
            "system.slice__memory_dot_max": "1000000\n",
            "system.slice__tutormax.service__memory_dot_max": "2000000\n",
        },
    )
    one = groups(
        tmp_path / "1",
        "5:devices:/\n4:memory:/docker/abc\n0::/\n",
        # That of the host is not there in a container.
        memory__memory_dot_limit_in_bytes="3000000\n",
    )
    none = groups(
        tmp_path / "0",
        "4:memory:/docker/abc\n",
        memory__memory_dot_limit_in_bytes="9223372036854771712\n",
    )
    assert memory.limits(two) == {"the control group's": 1_000_000}
    assert memory.limits(one) == {"the control group's": 3_000_000}
    assert memory.limits(none) == memory.limits(tmp_path / "no such system") == {}


@pytest.mark.parametrize(
    ("class_name", "text", "limit", "expected"),
    [
        ("MemoryError", "", None, True),
        ("ComputeError", "the plugin panicked", None, False),
        ("ComputeError", "the plugin panicked", 1 << 30, True),
        ("OSError", "[Errno 12] Cannot allocate memory", 1 << 30, True),
        ("OperationalError", "ERROR: out of memory", None, False),
        ("ValueError", "a sentence", 1 << 30, False),
    ],
)
def test_what_sounds_like_memory_is_believed_where_memory_is_limited(
    class_name: str,
    text: str,
    limit: int | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "limits", lambda: {memory.ADDRESS_SPACE: limit} if limit else {})

    assert memory.is_out_of_memory(class_name, text) is expected


def test_the_sentence_names_limits_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "limits", lambda: {memory.ADDRESS_SPACE: 1 << 30})
    assert memory.out_of_memory("It ended") == (
        "It ended. The limit of memory is ulimit -v 1,024 MiB. Raise it; or let a run need less:"
        " fewer dates at once with TUTORMAX_MAX_DATES_PER_RUN, or a date in parts with --tutors. No"
        " partition is half-written; run the dates again. MALLOC_ARENA_MAX=2 in the environment"
        " lets threads reserve less of it."
    )
    monkeypatch.setattr(memory, "limits", lambda: {"the control group's": 1 << 30})
    assert "The limit of memory is the control group's 1,024 MiB." in memory.out_of_memory("")
