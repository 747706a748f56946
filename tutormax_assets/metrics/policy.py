"""Windows, thresholds, weights, scale and limits: everything about a metric that may be set."""

import hashlib
import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from tutormax_assets.errors import UsageError

HIGHER_IS_BETTER = (
    "avg_rating",
    "first_session_success_rate",
    "engagement_score",
    "learning_objectives_met_pct",
)
LOWER_IS_BETTER = ("reschedule_rate", "no_show_count")


class PolicyError(UsageError):
    """The policy contradicts itself; the message names the setting and the reason."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Weights(_Part):
    """Shares of the three parts of ``engagement_score``; they add up to 1."""

    login: StrictFloat = Field(default=0.4, ge=0)
    session: StrictFloat = Field(default=0.4, ge=0)
    punctual: StrictFloat = Field(default=0.2, ge=0)

    @model_validator(mode="after")
    def _add_up_to_one(self) -> Self:
        total = self.login + self.session + self.punctual
        if abs(total - 1) > 1e-9:
            raise ValueError(
                f"login {self.login:g} + session {self.session:g} + punctual {self.punctual:g} "
                f"is {total:g}; expected 1"
            )
        return self


class Threshold(_Part):
    """Where a metric turns green (at the bound or better) and red (beyond the bound)."""

    green: StrictFloat
    red: StrictFloat


class Thresholds(_Part):
    """The bounds of the six metrics that carry flags, in the metrics' own units."""

    avg_rating: Threshold = Threshold(green=4.5, red=3.5)
    first_session_success_rate: Threshold = Threshold(green=85, red=70)
    reschedule_rate: Threshold = Threshold(green=10, red=15)
    no_show_count: Threshold = Threshold(green=0, red=3)
    engagement_score: Threshold = Threshold(green=80, red=60)
    learning_objectives_met_pct: Threshold = Threshold(green=90, red=80)

    @model_validator(mode="after")
    def _red_is_not_better_than_green(self) -> Self:
        for name in HIGHER_IS_BETTER:
            bound: Threshold = getattr(self, name)
            if bound.red > bound.green:
                raise ValueError(
                    f"{name}: red {bound.red:g} is above green {bound.green:g}; "
                    "higher is better here, so red has to be at or below green"
                )
        for name in LOWER_IS_BETTER:
            bound = getattr(self, name)
            if bound.red < bound.green:
                raise ValueError(
                    f"{name}: red {bound.red:g} is below green {bound.green:g}; "
                    "lower is better here, so red has to be at or above green"
                )
        return self


class TierFlags(_Part):
    """How many flags make a tier; the first match wins, from Exemplary down to Developing."""

    exemplary_green: StrictInt = Field(default=5, ge=0, le=6)
    at_risk_red: StrictInt = Field(default=3, ge=1, le=6)
    needs_attention_red: StrictInt = Field(default=1, ge=1, le=6)
    strong_green: StrictInt = Field(default=3, ge=1, le=6)

    @model_validator(mode="after")
    def _every_tier_can_be_reached(self) -> Self:
        if self.needs_attention_red >= self.at_risk_red:
            raise ValueError(
                f"needs_attention_red {self.needs_attention_red} is not below "
                f"at_risk_red {self.at_risk_red}; no tutor could need attention"
            )
        if self.strong_green >= self.exemplary_green:
            raise ValueError(
                f"strong_green {self.strong_green} is not below "
                f"exemplary_green {self.exemplary_green}; no tutor could be Strong"
            )
        return self


_Share = Annotated[StrictFloat, Field(ge=0, le=1)]


class CheckLimits(_Part):
    """How far data may be from the usual before an asset check warns, or fails and blocks."""

    set_aside_warn_share: _Share = Field(
        default=0.01, description="Rows set aside, of those read in a window: warns above."
    )
    set_aside_error_share: _Share = Field(
        default=0.05, description="Rows set aside, of those read in a window: fails above."
    )
    set_aside_min_rows: StrictInt = Field(
        default=100, ge=1, description="Rows read from which a share of them can fail a day."
    )
    other_tutor_feedback_share: _Share = Field(
        default=0.005, description="Feedback that is not of the session's tutor: warns above."
    )
    unknown_tutors_error_share: _Share = Field(
        default=0.05, description="Sessions of tutors who are not in tutors: fails above."
    )
    stale_warn_days: StrictInt = Field(
        default=3, ge=1, description="Days from the newest row to the reference date: warns above."
    )
    stale_error_days: StrictInt = Field(
        default=7, ge=1, description="Days from the newest row to the reference date: fails above."
    )
    stale_feedback_days: StrictInt = Field(
        default=14, ge=1, description="Days from the newest rated session: warns above."
    )
    window_loss_error_share: _Share = Field(
        default=0.5, description="Rows that the shortest window lacks of the usual: fails above."
    )
    volume_share: _Share = Field(
        default=0.5, description="How far the newest day may be from its weekday's median."
    )
    volume_deviations: StrictFloat = Field(
        default=5, ge=0, description="The same in robust standard deviations; both are exceeded."
    )
    volume_min_weeks: StrictInt = Field(
        default=4, ge=1, description="Earlier weeks with rows from which a median is taken."
    )
    null_share_rise: _Share = Field(
        default=0.1, description="Rise of a column's null share since the day before: warns above."
    )
    tier_shift: StrictFloat = Field(
        default=0.25, ge=0, description="Population stability index of the tiers: warns above."
    )
    thin_evidence_share: _Share = Field(
        default=0.25, description="Rows of the longest window with thin evidence: warns above."
    )
    comparison_min_tutors: StrictInt = Field(
        default=50, ge=1, description="Tutors from which a day is compared with the day before."
    )

    @model_validator(mode="after")
    def _warnings_come_before_errors(self) -> Self:
        for warn, error in (
            ("set_aside_warn_share", "set_aside_error_share"),
            ("stale_warn_days", "stale_error_days"),
        ):
            if getattr(self, warn) > getattr(self, error):
                raise ValueError(
                    f"{warn} {getattr(self, warn):g} is above {error} {getattr(self, error):g}; "
                    "a warning has to come at or before the failure"
                )
        return self


class Policy(_Part):
    """How metrics and tiers are computed and checked. The defaults are the contract's."""

    windows: tuple[Annotated[StrictInt, Field(ge=1, le=3660)], ...] = Field(
        default=(7, 30, 90), min_length=1, description="Lengths in days, shortest first."
    )
    session_score_scale: StrictInt = Field(
        default=1, description="Upper end of the platform's session engagement_score."
    )
    neutral_session_score: StrictFloat = Field(
        default=50, ge=0, le=100, description="Session part where no session has a score."
    )
    late_limit_minutes: StrictInt = Field(
        default=10, ge=0, description="A session that starts later than this is not punctual."
    )
    first_session_success_rating: StrictInt = Field(
        default=4, ge=1, le=5, description="Rating from which a first session is a success."
    )
    evidence_min_sessions: StrictInt = Field(
        default=5, ge=1, description="Sessions of a window below which its evidence is thin."
    )
    weights: Weights = Weights()
    thresholds: Thresholds = Thresholds()
    tier_flags: TierFlags = TierFlags()
    checks: CheckLimits = CheckLimits()

    @field_validator("session_score_scale")
    @classmethod
    def _scale_is_known(cls, value: int) -> int:
        if value not in (1, 100):
            raise ValueError(f"{value} is not a scale; expected 1 or 100")
        return value

    @model_validator(mode="after")
    def _windows_grow(self) -> Self:
        if list(self.windows) != sorted(set(self.windows)):
            raise ValueError(
                f"windows {list(self.windows)} are not in growing order; "
                f"expected {sorted(set(self.windows))}"
            )
        return self

    @property
    def horizon_days(self) -> int:
        """Length in days of the longest window."""
        return self.windows[-1]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that two policies share only if all their settings are equal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def with_overrides(self, overrides: Mapping[str, Any]) -> "Policy":
        """This policy with some settings replaced.

        Args:
            overrides: Nested settings by name, such as ``{"weights": {"login": 0.5, …}}``; what
                is not named stays as it is.

        Returns:
            The new policy.

        Raises:
            PolicyError: A name is unknown, a value malformed, or the result contradicts itself.
        """
        try:
            return Policy.model_validate(_merge(self.model_dump(), overrides))
        except ValidationError as error:
            raise PolicyError(
                "The metrics policy is refused. " + " ".join(_sentence(e) for e in error.errors())
            ) from None

    @classmethod
    def from_toml(cls, text: str) -> "Policy":
        """The default policy with the overrides of a TOML document.

        Raises:
            PolicyError: The text is not TOML, or as in ``with_overrides``.
        """
        try:
            overrides = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PolicyError(f"The metrics policy is not valid TOML: {error}.") from None
        return cls().with_overrides(overrides)


def window_name(days: int) -> str:
    """The value of the ``window`` column for a window of so many days."""
    return f"{days}day"


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in overrides.items():
        nested = isinstance(result.get(name), Mapping) and isinstance(value, Mapping)
        result[name] = _merge(result[name], value) if nested else value
    return result


def _sentence(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "policy"
    return f"{where}: {str(error['msg']).removeprefix('Value error, ')}."
