"""``python -m apps.migperf predict``: the table in, the table out, and a sentence for every mistake."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest

from apps.migperf.measurements import MeasurementError, read_table
from apps.migperf.predict import predict_file

HEAD = "source,gpu,mode,workload,batch,seq,profile,latency_ms,latency_std_ms,gract,fb_mib,oom"
FULL = [
    f"x,A100-40GB,infer,net,{batch},,7g.40gb,{ms},,,," for batch, ms in ((1, 5.1), (8, 6.0), (32, 16.5), (128, 62.0))
]


def _write(tmp_path, *lines, head=HEAD):
    path = tmp_path / "in.csv"
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def _predict(tmp_path, *lines, head=HEAD):
    out = tmp_path / "deep" / "out.csv"
    said = predict_file(_write(tmp_path, *lines, head=head), out)
    with out.open(newline="") as file:
        return said, list(csv.DictReader(file))


def test_rows_are_repeated_with_four_columns_more(tmp_path):
    said, rows = _predict(tmp_path, *FULL, "x,A100-40GB,infer,net,32,,2g.10gb,?,,,,?")
    assert said.startswith("Predicted 1 row of 1 workload (0 expected")
    assert list(rows[0]) == [*HEAD.split(","), "predicted_ms", "low_ms", "high_ms", "predicted_oom"]
    assert [row["latency_ms"] for row in rows] == ["5.1", "6.0", "16.5", "62.0", "?"]
    last = rows[-1]
    assert 30 < float(last["predicted_ms"]) < 65
    assert float(last["low_ms"]) < float(last["predicted_ms"]) < float(last["high_ms"])
    assert last["predicted_oom"] == "0"


def test_out_of_memory_is_foretold_from_the_frame_buffer(tmp_path):
    lines = [f"x,A100-40GB,train,big,{b},,7g.40gb,{10 * b},,,{2500 + 150 * b},0" for b in (8, 16, 32, 64)]
    _, rows = _predict(
        tmp_path, *lines, "x,A100-40GB,train,big,64,,1g.5gb,?,,,,", "x,A100-40GB,train,big,64,,7g.40gb,?,,,,"
    )
    assert [row["predicted_oom"] for row in rows[-2:]] == ["1", "0"]


def test_few_columns_and_other_columns_are_enough(tmp_path):
    lines = ["A100-80GB,inference,net,1,2,7g.80gb,5,a", "A100-80GB,infer,net,1,2,1g.10gb,?,b"]
    _, rows = _predict(tmp_path, *lines, head="gpu,mode,workload,batch,processes,profile,latency_ms,note")
    assert rows[1]["note"] == "b"
    assert float(rows[1]["predicted_ms"]) > 0


def test_groups_that_ask_nothing_and_know_nothing_are_passed_over(tmp_path):
    _, rows = _predict(
        tmp_path, *FULL, "x,A100-40GB,train,big,64,,1g.5gb,0,,,,1", "x,A100-40GB,infer,net,2,,1g.5gb,?,,,,"
    )
    assert rows[-2]["predicted_ms"] == ""
    assert float(rows[-1]["predicted_ms"]) > 0


def test_a_second_pass_replaces_the_added_columns(tmp_path):
    _predict(tmp_path, *FULL, "x,A100-40GB,infer,net,32,,2g.10gb,?,,,,")
    again = tmp_path / "again.csv"
    predict_file(tmp_path / "deep" / "out.csv", again)
    assert again.read_text() == (tmp_path / "deep" / "out.csv").read_text()


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "hold column names but no rows"),
        (FULL, "No row of .* asks for a prediction"),
        ([*FULL, "x,A100-40GB,infer,other,1,,1g.5gb,?,,,,"], "Nothing is known of 'other'"),
        ([*FULL, "x,Z9,infer,net,1,,1g.5gb,?,,,,"], "line 6: .*Z9"),
        ([*FULL, "x,A100-40GB,infer,net,1,,5g.5gb,?,,,,"], "line 6: '5g.5gb' is no profile of A100-40GB"),
        (
            [*FULL, "x,A100-40GB,infer,net,1,,2g.10gb,-3,,,,"],
            "line 6: latency_ms must be a finite number that is not negative",
        ),
        ([*FULL, "x,A100-40GB,infer,net,1,,2g.10gb,nan,,,,"], "line 6: latency_ms must be a finite number"),
        ([*FULL, "x,A100-40GB,infer,net,1,,2g.10gb,fast,,,,"], "line 6: latency_ms must be a number, not 'fast'"),
        ([*FULL, "x,A100-40GB,infer,net,1,,2g.10gb,0,,,,0"], "line 6: .*latency_ms is 0"),
        ([*FULL, "x,A100-40GB,infer,net,,,2g.10gb,?,,,,"], "line 6: batch must be a whole number"),
        ([*FULL, "x,A100-40GB,infer,net,1.5,,2g.10gb,?,,,,"], "line 6: batch must be a whole number"),
        ([*FULL, "x,A100-40GB,walk,net,1,,2g.10gb,?,,,,"], "line 6: mode must be infer or train"),
        ([*FULL, "x,A100-40GB,infer,,1,,2g.10gb,?,,,,"], "line 6: workload is empty"),
        ([*FULL, "x,A100-40GB,infer,net,1,,2g.10gb,?,,,,maybe"], "line 6: oom must be 0 or 1"),
        ([*FULL, "x,A100-40GB,infer"], "line 6: it has not 12 cells"),
        ([*FULL, "x,A100-40GB,infer,net,1,,2g.10gb,?,,,,,,9"], "line 6: it has not 12 cells"),
    ],
)
def test_mistakes_are_sentences(tmp_path, lines, sentence):
    with pytest.raises(MeasurementError, match=sentence):
        predict_file(_write(tmp_path, *lines), tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_missing_columns_files_and_content(tmp_path):
    with pytest.raises(MeasurementError, match="no column profile, latency_ms: wanted are gpu"):
        read_table(_write(tmp_path, "A100-40GB,infer,net,1", head="gpu,mode,workload,batch"))
    with pytest.raises(MeasurementError, match="do not exist"):
        read_table(tmp_path / "nowhere.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(MeasurementError, match="are empty"):
        read_table(tmp_path / "empty.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MeasurementError, match="cannot be read"):
        read_table(tmp_path / "binary.csv")


def test_miso_layout_is_read_in_milliseconds(tmp_path):
    head = "source,gpu,mode,workload,batch,profile,step_s_median,step_s_p95,steps"
    table = read_table(_write(tmp_path, "miso,A100-40GB,train,bert,2,2g.10gb,0.1213,0.1229,1980", head=head))
    assert table.rows[0].latency_ms == pytest.approx(121.3)
    assert table.rows[0].latency_std_ms == pytest.approx(1.6 / 1.645)


def test_the_command_line_says_a_mistake_in_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "apps.migperf",
        "predict",
        "--measurements",
        str(tmp_path / "no.csv"),
        "--out",
        "x.csv",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"migperf: The measurements {tmp_path / 'no.csv'} do not exist."


@pytest.mark.shared_data
def test_published_measurements_load(shared_data):
    sizes = {}
    for name in ("migprofiler", "parvagpu", "miso"):
        rows = read_table(shared_data / "mig" / f"{name}.csv").rows
        sizes[name] = (len(rows), sum(bool(row.oom) for row in rows), sum(row.latency_ms is not None for row in rows))
        assert all((row.latency_ms is None) == bool(row.oom) for row in rows)
    assert sizes["migprofiler"] == (336, 14, 322)
    assert sizes["miso"] == (93, 0, 93)
    assert sizes["parvagpu"][0] == 1575


@pytest.mark.shared_data
def test_unseen_workloads_of_the_published_data(shared_data):
    """Three families with a prior that has seen none of them: the whole leave-one-out is benchmarks.migperf_model."""
    from benchmarks.migperf.leave_out import learn_without, load_cases, mape, power_law, score

    bounds = {("vision_transformer", "migprofiler"): 8, ("vgg16", "parvagpu"): 10, ("mobilenet", "miso"): 12}
    cases = load_cases(shared_data / "mig")
    prior = learn_without(cases, [family for family, _ in bounds])
    for (family, source), bound in bounds.items():
        chosen = [case for case in cases if (case.family, case.source) == (family, source)]
        scores = [score(case, "7g+2g", prior) for case in chosen]
        assert mape(scores) < bound
        assert mape(scores) < 100 * np.mean(np.concatenate([power_law(case, "7g+2g") for case in chosen]))
        assert sum(one.oom_hits for one in scores) >= 0.9 * sum(one.oom_cells for one in scores)
