"""Names at the ends of curves do not lie on one another."""

from ds_plugin.sweeps import figure


def test_names_are_parted(tmp_path):
    with figure.panels(tmp_path / "figure.png", 1, 1) as axes:
        axis = axes[0][0]
        axis.set_ylim(0, 1)
        for name, height in (("b", 0.51), ("a", 0.5), ("c", 0.52), ("far", 0.9), ("outside", 2.0)):
            axis.annotate(name, (1, height))
    heights = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert heights["a"] == 0.5 and heights["far"] == 0.9 and heights["outside"] == 2.0
    assert heights["b"] - heights["a"] >= 0.04 and heights["c"] - heights["b"] >= 0.04
    assert (tmp_path / "figure.png").stat().st_size > 1000
