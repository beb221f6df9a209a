"""A table of latencies from elsewhere corrects a profile; one that cannot be used is refused in a sentence."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from autolite.architecture import shape_of
from autolite.cli import main
from autolite.configured import shape_of_config
from autolite.errors import InputError, ModelError
from autolite.hardware.calibration import Sample, scaled
from autolite.hardware.predict import predict
from autolite.hardware.profile import Profile
from autolite.hardware.profile_files import load_profile
from autolite.hardware.table import CALL, calibrated_by_table, read_table
from autolite.measure import Workload
from autolite.testing import tiny_model

PROFILE = load_profile("x86-avx2")
# A program whose operators cost many times as much, on a device with another memory.
OFF = {"memory": 1.5, "dispatch": 20.0, "around": 8.0, "fixed": 3.0}
NOISE = 0.03


def models(count: int, seed: int) -> list[dict[str, Any]]:
    """Random encoder-decoders and calls, as rows of a table."""
    rng = np.random.default_rng(seed)

    def one_of(*values: int) -> int:
        return int(rng.choice(values))

    return [
        {
            "model_type": "marian",
            "d_model": one_of(256, 512, 640, 768),
            **{f"{side}_layers": one_of(1, 2, 3, 4, 5, 6) for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": one_of(512, 1024, 2048, 3072) for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": one_of(4, 8) for side in ("encoder", "decoder")},
            "tokens": one_of(16, 30, 60, 120),
            "threads": 8,
            "generated": one_of(8, 16, 30),
        }
        for _ in range(count)
    ]


def samples(rows: list[dict[str, Any]], truth: Profile, seed: int) -> list[Sample]:
    """What they take on a device of which everything is known, give or take the noise of a timing."""
    rng, found = np.random.default_rng(seed), []
    for i, row in enumerate(rows):
        shape = shape_of_config({name: value for name, value in row.items() if name not in CALL})
        workload = Workload(**{name: value for name, value in row.items() if name in CALL})
        time = predict(shape, truth, workload)["latency_ms"].value * float(np.exp(NOISE * rng.standard_normal()))
        found.append(Sample(shape, workload, time, str(i % 10)))
    return found


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as lines:
        table = csv.DictWriter(lines, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return file


def table_of(file: Path, count: int, seed: int = 0) -> Path:
    """Write what random models take on the device."""
    rows = models(count, seed)
    times = samples(rows, scaled(PROFILE, OFF), seed)
    return written(file, [{**row, "latency_ms": each.milliseconds} for row, each in zip(rows, times, strict=True)])


def test_a_table_puts_a_profile_right(tmp_path: Path) -> None:
    known = read_table(table_of(tmp_path / "a.csv", 30), PROFILE)
    found = calibrated_by_table(PROFILE, known, "a.csv")
    assert np.abs(found.before).mean() > 0.3
    assert np.abs(found.errors).mean() < 2 * NOISE, "of models that were held out"
    assert found.factors["dispatch"] == pytest.approx(OFF["dispatch"], rel=0.3)
    new = samples(models(60, 1), scaled(PROFILE, OFF), 1)
    prices = [predict(each.shape, found.profile, each.workload)["latency_ms"] for each in new]
    off = [abs(price.value / each.milliseconds - 1) for price, each in zip(prices, new, strict=True)]
    assert np.mean(off) < 2 * NOISE
    inside = [price.low <= each.milliseconds <= price.high for price, each in zip(prices, new, strict=True)]
    assert np.mean(inside) >= 0.9
    number = found.profile.dispatch
    assert (number.kind, number.source) == ("calibrated", "30 latencies of a.csv")


def test_models_are_described_in_files_in_cells_and_in_columns(tmp_path: Path) -> None:
    fields = {"model_type": "bart", "d_model": 128, "encoder_layers": 2, "decoder_layers": 3}
    (tmp_path / "model.json").write_text(json.dumps({**fields, "decoder_layers": 1, "made_by": "somebody"}))
    call = {"tokens": 16, "generated": 4, "latency_ms": 2.5}
    cells = {**dict.fromkeys(fields, ""), "config": ""}
    by_column = {**cells, **fields, **call}
    by_cell = {**cells, "config": json.dumps(fields), **call}
    by_file = {**cells, "config": "model.json", "decoder_layers": 3, **call}
    other = {**cells, **fields, "d_model": 256, **call}
    found = read_table(written(tmp_path / "a.csv", [by_column, by_cell, by_file, other] * 3), PROFILE)
    first, second, third, last = (each.shape for each in found[:4])
    assert first == second == third == shape_of_config(fields)
    assert [len(stack.layers) for stack in third.stacks] == [2, 3]
    assert last.stacks[0].hidden == 256
    assert found[0].workload == Workload(1, 16, 1, 4)
    assert [each.group for each in found] == 3 * ["0", "0", "0", "1"], "a model is held out with all its rows"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latency_ms": "-1"}, r"a\.csv, row 4: latency_ms is '-1', which is no number of milliseconds above 0"),
        ({"latency_ms": "soon"}, "row 4: latency_ms is 'soon'"),
        ({"latency_ms": "nan"}, "row 4: latency_ms is 'nan'"),
        ({"latency_ms": ""}, "row 4: latency_ms is ''"),
        ({"tokens": "many"}, "row 4: .*tokens=many must be a whole number of at least 1"),
        ({"tokens": ""}, "row 4 has no tokens"),
        ({"threads": "64"}, "row 4: threads=64, but cpu of x86-avx2 has 8"),
        ({"model_type": "mariam"}, "row 4: unknown model_type 'mariam': did you mean 'marian'"),
        ({"model_type": ""}, "row 4: it has no model_type"),
        ({"d_model": "wide"}, "row 4: no marian can be made of these fields"),
        ({"d_model": "7"}, "row 4: an encoder of .* cannot be"),
    ],
)
def test_what_is_wrong_in_a_row_is_told_with_the_row(change: dict[str, str], message: str, tmp_path: Path) -> None:
    rows = [{**row, "latency_ms": 3} for row in models(12, 0)]
    rows[2] |= change
    with pytest.raises(InputError, match=message):
        read_table(written(tmp_path / "a.csv", rows), PROFILE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'latency_ms'; it has none"),
        ("model_type,latency_ms\n", "has no column 'tokens'"),
        ("latency_ms,tokens\n", "does not say what the models are: add a column 'config' or 'model_type'"),
        ("latency_ms,tokens,tokens,config\n", "has the column 'tokens' twice"),
        ("latency_ms,tokens,model_type\n1,2,marian,4\n", "row 2 has more cells than there are columns"),
        ("latency_ms,tokens,model_type\n1,2\n", "row 2 has fewer cells than there are columns"),
        ("latency_ms,tokens,config\n1,2,none.json\n", r"row 2: cannot read the config 'none\.json'"),
        ("latency_ms,tokens,config\n1,2,{\n", "row 2: cannot read the config"),
        ("latency_ms,tokens,model_type,d_modle\n1,2,marian,64\n", "unknown field of marian 'd_modle': did you mean"),
        ("latency_ms,tokens,model_type\n" + 11 * "1,2,marian\n", "has 11 rows of 1 model: a calibration needs 12 rows"),
        ("latency_ms,tokens,model_type\n" + 12 * "1,2,marian\n", "has 12 rows of 1 model: .* of 2 models at least"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "a.csv", PROFILE)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_a_configuration_has_the_shape_of_its_model(family: str) -> None:
    causal = family in ("gpt2", "llama")
    model = tiny_model(family, "language-modeling" if causal else "text-classification")
    assert shape_of_config(model.config.to_dict()) == shape_of(model)


def test_models_that_generate_nothing_have_no_steps(tmp_path: Path) -> None:
    row = {"model_type": "bert", "num_hidden_layers": 1, "tokens": 8, "generated": 4, "latency_ms": 1}
    with pytest.raises(InputError, match="row 2: generated=4, but a model of this kind generates nothing"):
        read_table(written(tmp_path / "a.csv", [row]), PROFILE)


def test_a_configuration_of_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match="it has no model_type"):
        shape_of_config({"hidden_size": 64})


def test_the_command_writes_a_profile(tmp_path: Path) -> None:
    table, file = table_of(tmp_path / "latencies.csv", 20), tmp_path / "mine.yaml"
    done = CliRunner().invoke(main, ["calibrate", "x86-avx2", "--table", str(table), "--out", str(file)])
    assert done.exit_code == 0, done.output
    assert "x86-avx2 as it was" in done.stdout
    assert f"next: autolite search --target {file}" in done.stdout
    found = load_profile(file)
    assert found.name == "mine"
    assert found.dispatch.source == "20 latencies of latencies.csv"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("x86-avx2", "--out", "mine.csv"), "mine.csv: a profile is a file that ends in .yaml"),
        (("x86-avx2", "--threads", "1"), "--threads is about timing, and with --table nothing is timed"),
        (("x86-avx2", "--fresh"), "--fresh is about timing"),
        (("x86-avx3",), "unknown target 'x86-avx3'"),
        ((), "name the one that is nearest to its device"),
        (("x86-avx2",), "has no column 'latency_ms'"),
    ],
)
def test_the_command_refuses_in_a_sentence(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("tokens,model_type\n")
    done = CliRunner().invoke(main, ["calibrate", *words, "--table", "a.csv"])
    assert done.exit_code == 2
    assert message in done.output
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]
