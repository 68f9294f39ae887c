"""Figures: equal bytes for equal tables, and an error for a table that would mislead."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from lambdascale.core import UserError
from lambdascale.experiments.compose import conf_dir
from lambdascale.figures.registry import FIGURES, load_table, render
from lambdascale.figures.style import looks, mark_setups, say_backend, styled

TABLES = conf_dir().parent / "results" / "tables"


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {name: load_table(TABLES, name) for name in FIGURES}


def contents(name: str, table: pd.DataFrame) -> list[tuple[str, ...]]:
    """Everything that a figure shows: what it is, its coordinates, and its colours or text. Saving it would take seconds."""
    found: list[tuple[str, ...]] = []
    with styled():
        figure = FIGURES[name].draw(FIGURES[name].tidy(table))
        for artist in figure.findobj():
            match artist:
                case Line2D():
                    look = (artist.get_color(), artist.get_linestyle(), artist.get_marker())
                    shown = [np.asarray(artist.get_xydata()).tolist(), look]
                case Patch():
                    shown = [artist.get_transform().transform(artist.get_path().vertices).tolist(), artist.get_facecolor()]
                case Collection():
                    points = [*(path.vertices for path in artist.get_paths()), artist.get_offsets(), artist.get_facecolor()]
                    shown = [np.asarray(each).tolist() for each in points]
                case Text():
                    shown = [artist.get_text(), artist.get_position()]
                case _:
                    shown = []
            found.append((type(artist).__name__, *map(repr, shown)))
        plt.close(figure)
    return found


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_table_gives_the_same_figure(name: str, tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    first = contents(name, tables[name])
    assert first == contents(name, tables[name])
    assert {"Line2D", "Text"} <= {kind for kind, *_ in first}
    vectors, pixels = render(name, tables[name], tmp_path)
    assert (vectors.suffix, pixels.suffix) == (".pdf", ".png")
    assert not re.findall(rb"/(?:CreationDate|ModDate|Producer|Creator)\b", vectors.read_bytes()), "what differs tomorrow"
    assert b"Software" not in pixels.read_bytes(), "what differs with another version"


@pytest.mark.parametrize("name", ["fig01_burstiness", "fig07_multicast"])
def test_the_same_table_gives_the_same_bytes(name: str, tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    one, two = (render(name, tables[name], tmp_path / part) for part in ("a", "b"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


@pytest.mark.parametrize("name", FIGURES)
def test_missing_rows_and_columns_are_errors(name: str, tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    table = tables[name]
    broken = {"no rows": table.iloc[:0], "lacks the columns backend": table.drop(columns="backend")}
    if len(set(table.system)) > 1 and len(set(table.model)) > 1:
        system, model = table.system.iloc[0], table.model.iloc[0]
        broken |= {f"no .*{system}|no .*{model}|lack": table[(table.system != system) | (table.model != model)]}
    for message, wrong in broken.items():
        with pytest.raises(UserError, match=message):
            render(name, wrong, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing was drawn"


@pytest.mark.parametrize("name", FIGURES)
def test_rows_of_two_backends_do_not_make_one_line(name: str, tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    table = tables[name].copy()
    table.loc[table.index[0], "backend"] = "live"
    with pytest.raises(UserError, match="several backends"):
        render(name, table, tmp_path)


def test_a_figure_is_drawn_as_a_whole_or_not_at_all(
    tables: dict[str, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle leaves the old file, and none that looks finished."""
    old = tmp_path / "fig01_burstiness.png"
    old.write_bytes(b"old")

    def interrupted(figure: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render("fig01_burstiness", tables["fig01_burstiness"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert old.read_bytes() == b"old"


def test_a_folder_that_cannot_be_written(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        render("fig01_burstiness", tables["fig01_burstiness"], tmp_path / "file")


def test_an_unknown_figure_and_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose from fig01"):
        load_table(tmp_path, "../secrets")
    with pytest.raises(UserError, match="no table fig07_multicast"):
        load_table(tmp_path, "fig07_multicast")


def test_every_system_looks_different() -> None:
    names = ["lambdascale", "faasnet", "lambdascale_k4", "lambdascale_k2", "mine", "yours"]
    found = [(look.color, look.dashes, look.marker) for look in looks(names).values()]
    assert len(set(found)) == len(names)


def test_set_ups_that_were_not_measured_are_marked() -> None:
    """NCCL's, in labels and titles; not those of another system whose label begins alike, and only if the table says so."""
    figure = Figure()
    axis = figure.subplots()
    for label in ("NCCL", "NCCL, no set-up", "λScale"):
        axis.plot([0], [0], label=label)
    figure.legend()
    axis.set_title("P90 TTFT, NCCL / λScale")
    table = pd.DataFrame({"system": ["nccl_broadcast", "lambdascale"], "setup": ["up to 12 ranks: one sample", None]})
    mark_setups(figure, table.assign(setup=None))
    assert not any("†" in text.get_text() for text in figure.findobj(Text))
    mark_setups(figure, table)
    shown = {text.get_text() for text in figure.findobj(Text)}
    assert {"NCCL†", "NCCL, no set-up", "λScale", "P90 TTFT, NCCL† / λScale"} <= shown
    assert any("up to 12 ranks: one sample" in text for text in shown)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]


def test_rows_with_both_sides_are_live_and_simulated() -> None:
    with styled():
        figure = plt.figure()
        say_backend(figure, pd.DataFrame({"backend": ["live and sim"]}))
        assert texts(figure) == ["live and simulated"]
        plt.close(figure)


def test_bars_are_marked_as_the_legend_is(tables: dict[str, pd.DataFrame]) -> None:
    table = tables["fig11_gpus"].assign(setup="")
    table.loc[table.system == "nccl_broadcast", "setup"] = "up to 12 ranks: one sample"
    with styled():
        figure = FIGURES["fig11_gpus"].draw(FIGURES["fig11_gpus"].tidy(table))
        mark_setups(figure, table)
        assert texts(figure).count("NCCL†") == 1 + table.model.nunique(), "the legend, and the bars of each model"
        plt.close(figure)


def test_rings_and_areas_are_explained(tables: dict[str, pd.DataFrame]) -> None:
    for name, explained in (("ablation_blocks", "fewest within 10% of the best"), ("sensitivity", "its interval of 95 %")):
        with styled():
            figure = FIGURES[name].draw(FIGURES[name].tidy(tables[name]))
            assert explained in texts(figure)
            assert "1e+03" not in texts(figure)
            plt.close(figure)
