"""Settings, budgets and schedules: pure functions."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from upfit.errors import UpfitError
from upfit.uptrain.config import Config, budget, check, dump, resolve, save_interval, tables
from upfit.uptrain.schedule import MAX_BATCH_TOKENS, learning_rate, make_plan, peak_rate


def test_a_dumped_config_is_read_back_the_same(tmp_path: Path) -> None:
    config = Config(tokens="50M", learning_rate=1e-4, document_mask=False, track='a "name"')
    of_stages = {"layerwise": {"learning_rate": 1e-3, "save_every": "20"}}
    (tmp_path / "c.toml").write_text(dump(config, of_stages))
    assert resolve(tmp_path / "c.toml", {}) == config
    assert tables(tmp_path / "c.toml") == of_stages


def test_flags_override_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.toml").write_text('share = "5%"\noriginal_tokens = "2T"\nseed = 3\n')
    assert resolve(tmp_path / "c.toml", {"seed": 4}) == Config(share="5%", original_tokens="2T", seed=4)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(Path("~/c.toml"), {"tokens": "1M"}) == Config(tokens="1M", seed=3)


@pytest.mark.parametrize(
    "content,names",
    [
        ("sede = 1", "'sede'"),
        ("seed = [", "TOML"),
        ("[distill]\nsede = 1", "'sede'"),
        ("[distil]\nseed = 1", "'distil'"),
        ('seed = "x"', "--seed"),
        ('dtype = "float16"', "bfloat16"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: str, names: str) -> None:
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises(UpfitError, match=names) as caught:
        resolve(tmp_path / "c.toml", {})
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UpfitError, match="cannot be read"):
        resolve(tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("length", 1, "--length got 1; it takes 2 or more"),
        ("micro_batch", 0, "micro_batch got 0; it takes 1 or more"),
        ("learning_rate", 0.0, "--learning-rate got 0.0; it takes a number above 0"),
        ("warmup", 1.1, "warmup got 1.1; it takes a number from 0 to 1"),
        ("mix_share", 1.0, "mix_share got 1.0; it takes a number above 0 and below 1"),
        ("mix_share", 0.0, "mix_share got 0.0; it takes a number above 0 and below 1"),
        ("chunk", 0, "chunk got 0; it takes 1 or more"),
        ("keep", 0, "keep got 0; it takes 1 or more"),
        ("max_bad_steps", 0, "max_bad_steps got 0; it takes 1 or more"),
        ("seed", -1, "--seed got -1; it takes 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: float, line: str) -> None:
    """Told by the flag, or by the key of the config file where it is no flag."""
    changes: dict[str, Any] = {field: value}
    with pytest.raises(UpfitError, match=f"^{line}$"):
        check(dataclasses.replace(Config(), **changes))


def test_budgets() -> None:
    assert budget(Config(tokens="50k")) == 50_000
    assert budget(Config(share="5%", original_tokens="2T")) == 10**11
    for wrong in (Config(), Config(share="5%"), Config(tokens="1", share="5%"), Config(tokens="none")):
        with pytest.raises(UpfitError):
            budget(wrong)


def test_save_intervals() -> None:
    assert save_interval("200") == (200, None) and save_interval("15m") == (None, 900.0)
    for wrong in ("", "m", "0", "-5", "1.5m", "soon"):
        with pytest.raises(UpfitError, match="save-every"):
            save_interval(wrong)


@pytest.mark.parametrize("tokens", ["20k", "50k", "200k", "1M", "50M", "10B"])
def test_a_plan_spends_the_budget_in_enough_steps(tokens: str) -> None:
    plan = make_plan(Config(tokens=tokens), 512)
    wanted = budget(Config(tokens=tokens))
    assert wanted <= plan.tokens < wanted + plan.tokens_a_step
    assert plan.steps >= min(49, wanted // plan.length)
    assert plan.length <= plan.tokens_a_step <= MAX_BATCH_TOKENS


def test_plans_that_cannot_be() -> None:
    assert make_plan(Config(tokens="1M"), None).length == 2048
    assert make_plan(Config(tokens="1M", batch_tokens="8192", length=512), 512).rows == 16
    with pytest.raises(UpfitError, match="--length 600"):
        make_plan(Config(tokens="1M", length=600), 512)
    with pytest.raises(UpfitError, match="--batch-tokens 100"):
        make_plan(Config(tokens="1M", batch_tokens="100", length=512), 512)


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    rates = [learning_rate(step, 100, 2.0, 0.1, 0.2, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:80] == [2.0] * 71
    assert all(earlier < later for earlier, later in zip(rates[:10], rates[1:10], strict=False))
    assert all(earlier > later for earlier, later in zip(rates[79:99], rates[80:], strict=True))
    assert 0.2 < rates[-1] < 0.3, "the end is near the smallest rate, and no step is wasted on it"


@pytest.mark.parametrize("steps", [10, 100])
def test_the_fall_follows_the_root_of_its_progress(steps: int) -> None:
    """Not a straight line: half of the fall is over after a quarter of its steps (arXiv:2405.18392)."""
    rates = [learning_rate(step, steps, 1.0, 0.0, 1.0, 0.0) for step in range(steps)]
    done = [(step + 1) / (steps + 1) for step in range(steps)]
    assert rates == pytest.approx([1 - share**0.5 for share in done])
    assert rates[(steps + 1) // 4 - 1] == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("min_rate", [0.0, 0.3, 1.0])
def test_a_rate_never_falls_below_its_least(min_rate: float) -> None:
    rates = [learning_rate(step, 50, 2.0, 0.1, 0.5, min_rate) for step in range(50)]
    last = min_rate + (1 - min_rate) * (1 - (25 / 26) ** 0.5)
    assert min(rates[5:]) >= 2.0 * min_rate and rates[-1] == pytest.approx(2.0 * last)


def test_schedules_at_their_edges() -> None:
    assert learning_rate(0, 1, 1.0, 0.0, 0.0, 0.0) == 1.0
    assert learning_rate(0, 1, 1.0, 0.02, 0.2, 0.0) > 0
    assert peak_rate(Config(learning_rate=0.5), 64, "lm") == 0.5
    assert peak_rate(Config(), 64, "lm", healthy=True) == pytest.approx(peak_rate(Config(), 64, "lm") / 5)
    assert peak_rate(Config(), 64, "distill", healthy=True) == peak_rate(Config(), 64, "lm")
    assert peak_rate(Config(), 64, "lm") > peak_rate(Config(), 4096, "lm") > peak_rate(Config(), 4096, "answers") > 0


def test_config_does_not_import_torch() -> None:
    code = "import sys, upfit.uptrain.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
