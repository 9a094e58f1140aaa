"""Quantities against Kubernetes' own rules: suffixes, rounding away from zero, bounds."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.intake.quantity import QuantityError, milli, nano, whole

SIZES = {
    "": Fraction(1),
    **{
        suffix: Fraction(10) ** (3 * power)
        for suffix, power in zip("numkMGTPE", [-3, -2, -1, 1, 2, 3, 4, 5, 6], strict=True)
    },
    **{f"{letter}i": Fraction(1024) ** power for power, letter in enumerate("KMGTPE", start=1)},
    **{
        f"{letter}{sign}{power}": Fraction(10) ** int(f"{sign}{power}")
        for letter in "eE"
        for sign in ("", "+", "-")
        for power in (0, 1, 12, 99)
    },
}


@pytest.mark.parametrize(
    ("written", "units", "thousandths"),
    [
        ("0", 0, 0),
        ("4", 4, 4000),
        ("+4", 4, 4000),
        ("-4", -4, -4000),
        ("500m", 1, 500),
        ("0.1m", 1, 1),
        ("1n", 1, 1),
        ("-1n", -1, -1),
        ("1u", 1, 1),
        ("1.5", 2, 1500),
        (".5", 1, 500),
        ("1.", 1, 1000),
        ("007", 7, 7000),
        ("1k", 1000, 10**6),
        ("1E", 10**18, 10**21),
        ("1e3", 1000, 10**6),
        ("1E3", 1000, 10**6),
        ("15e-1", 2, 1500),
        ("8Gi", 8 << 30, (8 << 30) * 1000),
        ("1.5Ki", 1536, 1536000),
        ("0.0001Ki", 1, 103),
        (" 2 ", 2, 2000),
        (3, 3, 3000),
        (0.5, 1, 500),
        (1e15, 10**15, 10**18),
        (None, 0, 0),
    ],
)
def test_what_kubernetes_reads(written: object, units: int, thousandths: int) -> None:
    assert whole(written) == units
    if abs(thousandths) <= 1 << 62:
        assert milli(written) == thousandths


@pytest.mark.parametrize(
    "written",
    [
        "",
        " ",
        "+",
        ".",
        "1 Gi",
        "1gi",
        "1K",
        "1KiB",
        "e3",
        "1e",
        "1ee3",
        "1e1.5",
        "1e100",
        "--1",
        "1_0",
        "0x10",
        "\u0661",
        "1" * 65,
        "4Ei1",
        "NaN",
        "inf",
        float("nan"),
        float("inf"),
        True,
        [],
        {},
        b"1",
        "5E",
        "-5E",
        "8Ei",
        5 * 10**18,
        "9e18",
        1e300,
    ],
)
def test_what_is_refused_with_a_sentence(written: object) -> None:
    with pytest.raises(QuantityError) as refused:
        whole(written)
    assert "write" in str(refused.value) or "ask for less" in str(refused.value)
    assert len(str(refused.value)) < 200


def test_bounds_are_inclusive() -> None:
    assert whole("4Ei") == 1 << 62
    assert whole(1 << 62) == 1 << 62
    with pytest.raises(QuantityError):
        whole((1 << 62) + 1)
    assert milli("4611686018427387.904") == 1 << 62
    with pytest.raises(QuantityError, match="ask for less"):
        milli("4Ei")


@given(
    st.sampled_from(["", "+", "-"]),
    st.integers(0, 10**12),
    st.none() | st.from_regex(r"[0-9]{0,9}", fullmatch=True),
    st.sampled_from(sorted(SIZES)),
)
def test_every_form_equals_exact_fractions(sign: str, before: int, after: str | None, suffix: str) -> None:
    written = f"{sign}{before}" + ("" if after is None else f".{after}") + suffix
    exact = Fraction(f"{before}.{after or '0'}") * SIZES[suffix]
    if ceil(exact * 10**9) > (1 << 62) * 10**9:
        with pytest.raises(QuantityError):
            nano(written)
        return
    size = ceil(exact * 10**9)
    assert nano(written) == (-size if sign == "-" else size)
    assert abs(whole(written)) == ceil(Fraction(size, 10**9))


@given(st.text())
def test_any_text_is_read_or_refused(written: str) -> None:
    try:
        units = whole(written)
    except QuantityError:
        return
    assert abs(units) <= 1 << 62
