import gzip
import json
import lzma
import math

import numpy as np
import pytest

from mixtral_jax.training import report

LAYERS, EXPERTS = 3, 5


def training_line(step, loss=None, key=0):
    rng = np.random.default_rng([step, key])
    share = rng.dirichlet(np.ones(EXPERTS) * 4, size=LAYERS)
    return {
        "step": step,
        "loss": 8 * math.exp(-step / 30) + 2 if loss is None else loss,
        "load_balance": 2 + 1 / step,
        "tokens_per_second": 1000.0,
        "expert_load_max_over_mean": (share.max(axis=1) * EXPERTS).tolist(),
        "expert_share": share.tolist(),
    }


def validation_line(step, loss=2.5):
    bits = loss / math.log(2) / 3
    return {"step": step, "validation_loss": loss, "validation_bits_per_byte": bits}


def write(run_dir, lines, tail=""):
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (run_dir / "metrics.jsonl").write_text(text, encoding="utf-8")


def read_png(path):
    from matplotlib.image import imread

    return imread(path)


def test_compression_is_eight_bits_times_the_ratio_of_the_compressed_size():
    text = bytes(range(256)) * 37 + b"def one(): return 1\n" * 1001
    got = report.compression_bits_per_byte(text)
    assert got == {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
    assert 0 < got["xz -9"] < got["gzip -9"] < 1


def test_compression_of_noise_costs_a_little_more_than_eight_bits():
    noise = np.random.default_rng(0).bytes(10007)
    assert all(8 < bits < 8.1 for bits in report.compression_bits_per_byte(noise).values())


def test_compression_refuses_an_empty_text():
    with pytest.raises(ValueError, match="text is empty"):
        report.compression_bits_per_byte(b"")


def test_summary_lines_align_the_figures():
    lines = report.summary_lines(1.23456, {"gzip -9": 2.0, "xz -9": 1.75}, 1234567)
    assert lines == [
        "bits per byte on the same 1,234,567 held-out bytes (lower is better)",
        "  this model   1.235",
        "  gzip -9      2.000",
        "  xz -9        1.750",
    ]


def test_later_line_of_a_step_wins_and_steps_come_in_order(tmp_path):
    lines = [training_line(s, loss=1.0 * s) for s in (1, 2, 3, 4)]
    lines += [validation_line(4, loss=9.0)]
    lines += [training_line(s, loss=10.0 * s) for s in (3, 4, 5)]
    lines += [validation_line(4, loss=8.0)]
    write(tmp_path, lines)
    training, validation = report.read_metrics(tmp_path / "metrics.jsonl")
    assert [(x["step"], x["loss"]) for x in training] == [(1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]
    assert [(x["step"], x["validation_loss"]) for x in validation] == [(4, 8.0)]


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3, "loss": ', "12", "\n", "[1]\n"])
def test_a_line_that_is_no_record_is_left_out(tmp_path, tail):
    write(tmp_path, [training_line(1), training_line(2)], tail)
    training, validation = report.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in training] == [1, 2]
    assert validation == []


def test_a_character_cut_in_two_does_not_break_reading(tmp_path):
    write(tmp_path, [training_line(1)])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write('{"note": "é'.encode()[:-1])
    assert len(report.read_metrics(tmp_path / "metrics.jsonl")[0]) == 1


def test_smooth_averages_a_centred_window_without_unknown_values():
    values = np.arange(83.0)  # 83 // 40 = 2 on each side
    values[50] = np.nan
    got = report.smooth(values)
    np.testing.assert_allclose(got[:48], np.arange(48.0))
    np.testing.assert_allclose(got[50], (48 + 49 + 51 + 52) / 4)
    np.testing.assert_allclose(got[-1], (80 + 81 + 82) / 3)
    assert np.isnan(report.smooth(np.full(5, np.nan))).all()


def test_report_is_a_picture_with_something_in_every_panel(tmp_path):
    lines = [training_line(s) for s in range(5, 101, 5)]
    write(tmp_path, [*lines, validation_line(50, 3.0), validation_line(100)], '{"step": 105, "l')
    path = report.draw_report(tmp_path, 2.0, {"gzip -9": 2.1, "xz -9": 1.9})
    assert path == tmp_path / "report.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.png"]
    image = read_png(path)
    height, width = image.shape[:2]
    assert (width, height) == (1600, 1100)
    panels = [image[: height // 2]]
    panels += [image[height // 2 :, width * i // 3 : width * (i + 1) // 3] for i in range(3)]
    for panel in panels:
        inked = (panel[..., :3].min(axis=-1) < 0.95).mean()
        assert inked > 0.01


def test_panels_show_the_recorded_values():
    from matplotlib.figure import Figure

    lines = [training_line(s) for s in (10, 20, 30)]
    figure = Figure(layout="constrained")
    report._draw(figure, lines, [validation_line(30)], 2.0, {"gzip -9": 2.1})
    panels = {a.get_title(loc="center") or a.get_title(loc="left"): a for a in figure.axes}
    loss, balance = panels["Loss"], panels["Load-balancing loss (even: 2)"]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [line["loss"] for line in lines])
    np.testing.assert_allclose(loss.lines[2].get_ydata(), [2.5])
    # 2.5 nats a token are 2.5 / ln 2 / 3 bits a byte, so 2.1 bits a byte are 6.3 ln 2 nats a token
    np.testing.assert_allclose(loss.lines[3].get_ydata(), 6.3 * math.log(2))
    np.testing.assert_allclose(balance.lines[0].get_ydata(), [2.1, 2.05, 2 + 1 / 30])
    np.testing.assert_allclose(balance.lines[2].get_ydata(), 2.0)
    busiest = panels["Busiest expert (even: 1)"].lines[1].get_ydata()
    load = [np.mean(line["expert_load_max_over_mean"]) for line in lines]
    np.testing.assert_allclose(busiest, load)
    assert panels["Busiest expert (even: 1)"].get_legend() is None  # it would cover them
    bands = panels["Share of tokens per expert"].collections
    assert len(bands) == EXPERTS
    image = panels["Last step's load (even: 1)"].images[0].get_array()
    np.testing.assert_allclose(image, np.array(lines[-1]["expert_share"]) * EXPERTS)


def test_a_step_alone_stands_between_whole_numbers():
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    report._draw(figure, [training_line(2)], [], 2.0, {})
    for axes in figure.axes[:3]:
        low, high = axes.get_xlim()
        assert [x for x in axes.get_xticks() if low <= x <= high] == [1, 2, 3], axes.get_title()


@pytest.mark.parametrize(
    "lines",
    [
        [training_line(10)],
        [training_line(10, loss=math.nan), training_line(20, loss=math.inf)],
        [{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}],
        [training_line(1), validation_line(1, math.nan)],
        [training_line(1), {"step": 1, "validation_loss": 2.0}],
        [{**training_line(1), "expert_share": [[0.0, 1.0, 0.0]]}],
        [{**training_line(1), "expert_share": np.full((20, 40), 1 / 40).tolist()}],
    ],
    ids=["one", "not finite", "bare", "nan validation", "no bits", "collapsed", "many experts"],
)
def test_odd_runs_are_drawn_too(tmp_path, lines):
    write(tmp_path, lines)
    assert report.draw_report(tmp_path, 2.0, {"gzip -9": 2.0}).stat().st_size > 10_000


def test_a_failed_drawing_leaves_the_old_picture_and_no_other_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    write(tmp_path, [training_line(1)])
    (tmp_path / "report.png").write_bytes(b"old")

    def fail(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        report.draw_report(tmp_path, 2.0, {})
    assert (tmp_path / "report.png").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.png"]


def test_a_run_without_training_lines_is_refused_by_name(tmp_path):
    write(tmp_path, [validation_line(1)])
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no training line"):
        report.draw_report(tmp_path, 2.0, {})
