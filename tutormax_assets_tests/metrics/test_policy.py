"""What may be set, and what is refused."""

import math
from typing import Any

import pytest

from tutormax_assets.metrics.policy import Policy, PolicyError, window_name


def test_the_defaults_are_the_contracts() -> None:
    assert Policy().model_dump() == {
        "windows": (7, 30, 90),
        "session_score_scale": 1,
        "neutral_session_score": 50,
        "late_limit_minutes": 10,
        "first_session_success_rating": 4,
        "evidence_min_sessions": 5,
        "weights": {"login": 0.4, "session": 0.4, "punctual": 0.2},
        "thresholds": {
            "avg_rating": {"green": 4.5, "red": 3.5},
            "first_session_success_rate": {"green": 85, "red": 70},
            "reschedule_rate": {"green": 10, "red": 15},
            "no_show_count": {"green": 0, "red": 3},
            "engagement_score": {"green": 80, "red": 60},
            "learning_objectives_met_pct": {"green": 90, "red": 80},
        },
        "tier_flags": {
            "exemplary_green": 5,
            "at_risk_red": 3,
            "needs_attention_red": 1,
            "strong_green": 3,
        },
        "checks": {
            "set_aside_warn_share": 0.01,
            "set_aside_error_share": 0.05,
            "set_aside_min_rows": 100,
            "other_tutor_feedback_share": 0.005,
            "unknown_tutors_error_share": 0.05,
            "stale_warn_days": 3,
            "stale_error_days": 7,
            "stale_feedback_days": 14,
            "window_loss_error_share": 0.5,
            "volume_share": 0.5,
            "volume_deviations": 5,
            "volume_min_weeks": 4,
            "null_share_rise": 0.1,
            "tier_shift": 0.25,
            "thin_evidence_share": 0.25,
            "comparison_min_tutors": 50,
        },
    }


def test_the_longest_window_is_the_horizon() -> None:
    assert Policy().horizon_days == 90
    assert Policy().with_overrides({"windows": [14]}).horizon_days == 14


@pytest.mark.parametrize(("days", "name"), [(7, "7day"), (30, "30day"), (90, "90day")])
def test_window_names(days: int, name: str) -> None:
    assert window_name(days) == name


def test_no_overrides_change_nothing() -> None:
    assert Policy.from_toml("") == Policy().with_overrides({}) == Policy()
    assert Policy().with_overrides({"thresholds": {"avg_rating": {}}}) == Policy()


def test_toml_overrides() -> None:
    policy = Policy.from_toml("""
        windows = [14, 28]
        session_score_scale = 100
        late_limit_minutes = 5

        [weights]
        login = 0.25
        session = 0.5
        punctual = 0.25

        [thresholds]
        reschedule_rate = { green = 5, red = 20.5 }

        [tier_flags]
        at_risk_red = 4
    """)

    assert policy.windows == (14, 28)
    assert policy.session_score_scale == 100
    assert policy.late_limit_minutes == 5
    assert policy.weights.model_dump() == {"login": 0.25, "session": 0.5, "punctual": 0.25}
    assert policy.thresholds.reschedule_rate.model_dump() == {"green": 5, "red": 20.5}
    assert policy.tier_flags.at_risk_red == 4


def test_a_nested_override_keeps_the_rest() -> None:
    policy = Policy.from_toml("thresholds.avg_rating.green = 4.8\ntier_flags.strong_green = 2")

    expected = Policy().model_dump()
    expected["thresholds"]["avg_rating"]["green"] = 4.8
    expected["tier_flags"]["strong_green"] = 2
    assert policy.model_dump() == expected


def test_overrides_add_up_and_leave_the_original_alone() -> None:
    first = Policy().with_overrides({"late_limit_minutes": 5})
    second = first.with_overrides({"windows": [30]})

    assert (second.late_limit_minutes, second.windows) == (5, (30,))
    assert first.windows == (7, 30, 90)
    assert Policy().late_limit_minutes == 10


@pytest.mark.parametrize(
    "overrides",
    [
        {"thresholds": {"avg_rating": {"green": 4, "red": 4}}},
        {"thresholds": {"no_show_count": {"green": 3, "red": 3}}},
        {"weights": {"login": 1, "session": 0, "punctual": 0}},
        {"weights": {"login": 0.1, "session": 0.7, "punctual": 0.2}},
        {"neutral_session_score": 0},
        {"neutral_session_score": 100},
        {"late_limit_minutes": 0},
        {"windows": [1, 3660]},
        {"tier_flags": {"exemplary_green": 6, "strong_green": 5, "at_risk_red": 6}},
        {"checks": {"set_aside_warn_share": 0.05, "stale_warn_days": 7}},
        {"checks": {"set_aside_error_share": 1, "tier_shift": 0}},
    ],
)
def test_what_the_bounds_allow(overrides: dict[str, Any]) -> None:
    assert isinstance(Policy().with_overrides(overrides), Policy)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            {"weights": {"login": 0.5}},
            r"weights: login 0\.5 \+ session 0\.4 \+ punctual 0\.2 is 1\.1; expected 1",
        ),
        ({"weights": {"login": 0.3}}, r"is 0\.9; expected 1"),
        (
            {"weights": {"login": 1.2, "session": -0.4}},
            r"weights\.session: .*greater than or equal to 0",
        ),
        (
            {"thresholds": {"avg_rating": {"red": 4.6}}},
            r"avg_rating: red 4\.6 is above green 4\.5; higher is better",
        ),
        (
            {"thresholds": {"first_session_success_rate": {"green": 60}}},
            "first_session_success_rate: red 70 is above green 60",
        ),
        ({"thresholds": {"engagement_score": {"red": 81}}}, "engagement_score: red 81 is above"),
        (
            {"thresholds": {"learning_objectives_met_pct": {"red": 91}}},
            "learning_objectives_met_pct: red 91 is above green 90",
        ),
        (
            {"thresholds": {"reschedule_rate": {"red": 9.5}}},
            r"reschedule_rate: red 9\.5 is below green 10; lower is better",
        ),
        (
            {"thresholds": {"no_show_count": {"green": 4}}},
            "no_show_count: red 3 is below green 4; lower is better",
        ),
        ({"window": [7]}, r"window: Extra inputs are not permitted"),
        ({"weights": {"logins": 0.4}}, r"weights\.logins: Extra inputs"),
        ({"thresholds": {"avg_rating": {"amber": 4}}}, r"thresholds\.avg_rating\.amber: Extra"),
        ({"thresholds": {"sessions_completed": {"green": 1, "red": 0}}}, "sessions_completed: Ext"),
        ({"late_limit_minutes": "ten"}, "late_limit_minutes: .*valid integer"),
        ({"late_limit_minutes": 10.5}, "late_limit_minutes: .*valid integer"),
        ({"late_limit_minutes": None}, "late_limit_minutes: .*valid integer"),
        ({"late_limit_minutes": -1}, "late_limit_minutes: .*greater than or equal to 0"),
        ({"first_session_success_rating": 6}, "success_rating: .*less than or equal to 5"),
        ({"first_session_success_rating": 0}, "success_rating: .*greater than or equal to 1"),
        ({"weights": 1}, "weights: .*valid dictionary"),
        ({"thresholds": {"avg_rating": 4.5}}, r"thresholds\.avg_rating: .*valid dictionary"),
        ({"windows": 7}, "windows: .*valid tuple"),
        ({"windows": []}, "windows: .*at least 1 item"),
        ({"windows": [0]}, r"windows\.0: .*greater than or equal to 1"),
        ({"windows": [3661]}, r"windows\.0: .*less than or equal to 3660"),
        ({"windows": [30, 7]}, r"windows \[30, 7\] are not in growing order; expected \[7, 30\]"),
        ({"windows": [7, 7, 30]}, r"\[7, 7, 30\] are not in growing order; expected \[7, 30\]"),
        ({"session_score_scale": 10}, "session_score_scale: .* is not a scale; expected 1 or 100"),
        ({"session_score_scale": 0}, "session_score_scale: .* is not a scale; expected 1 or 100"),
        ({"neutral_session_score": 101}, "neutral_session_score: .*less than or equal to 100"),
        ({"neutral_session_score": math.nan}, "neutral_session_score: .*finite number"),
        ({"weights": {"login": math.nan}}, r"weights\.login: .*finite number"),
        ({"weights": {"login": math.inf}}, r"weights\.login: .*finite number"),
        (
            {"thresholds": {"avg_rating": {"green": math.inf}}},
            r"thresholds\.avg_rating\.green: .*finite number",
        ),
        (
            {"thresholds": {"reschedule_rate": {"red": -math.inf}}},
            r"thresholds\.reschedule_rate\.red: .*finite number",
        ),
        (
            {"tier_flags": {"at_risk_red": 1}},
            "needs_attention_red 1 is not below at_risk_red 1; no tutor could need attention",
        ),
        (
            {"tier_flags": {"strong_green": 5}},
            "strong_green 5 is not below exemplary_green 5; no tutor could be Strong",
        ),
        ({"tier_flags": {"at_risk_red": 7}}, r"tier_flags\.at_risk_red: .*less than or equal to 6"),
        ({"tier_flags": {"exemplary_green": 7}}, r"exemplary_green: .*less than or equal to 6"),
        ({"tier_flags": {"needs_attention_red": 0}}, r"needs_attention_red: .*equal to 1"),
        (
            {"checks": {"set_aside_warn_share": 0.06}},
            r"set_aside_warn_share 0\.06 is above set_aside_error_share 0\.05; a warning has to",
        ),
        ({"checks": {"stale_error_days": 2}}, "stale_warn_days 3 is above stale_error_days 2"),
        ({"checks": {"null_share_rise": 1.5}}, r"checks\.null_share_rise: .*equal to 1"),
        ({"checks": {"stale_days": 3}}, r"checks\.stale_days: Extra inputs"),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(PolicyError, match=f"^The metrics policy is refused. .*{reason}"):
        Policy().with_overrides(overrides)


@pytest.mark.parametrize("exemplary_green", [1, 5])
def test_a_policy_without_developing_is_refused(exemplary_green: int) -> None:
    # Nobody has fewer than 0 green flags.
    flags = {"strong_green": 0, "exemplary_green": exemplary_green}
    with pytest.raises(PolicyError, match="strong_green"):
        Policy().with_overrides({"tier_flags": flags})


@pytest.mark.parametrize(
    "toml",
    [
        "late_limit_minutes = true",
        "session_score_scale = true",
        "windows = [true, 7]",
        "weights = { login = true, session = false, punctual = false }",
    ],
)
def test_a_truth_value_is_no_number(toml: str) -> None:
    with pytest.raises(PolicyError):
        Policy.from_toml(toml)


@pytest.mark.parametrize(
    "toml",
    [
        'late_limit_minutes = "10"',
        'neutral_session_score = "50"',
        'windows = ["7"]',
        'weights = { login = "0.4" }',
    ],
)
def test_a_text_is_no_number(toml: str) -> None:
    with pytest.raises(PolicyError, match=r"Input should be a valid (integer|number)"):
        Policy.from_toml(toml)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(PolicyError, match=r"windows: .* late_limit_minutes: ") as refusal:
        Policy().with_overrides({"windows": 7, "late_limit_minutes": -1, "colour": "red"})

    assert "colour: Extra inputs" in str(refusal.value)


@pytest.mark.parametrize("text", ["windows = ", "windows = [7", "= 1", "a = 1\na = 2"])
def test_malformed_toml_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match=r"^The metrics policy is not valid TOML: .*"):
        Policy.from_toml(text)


def test_toml_knows_nan_and_it_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"neutral_session_score: .*finite number"):
        Policy.from_toml("neutral_session_score = nan")
