"""The graph of a run, drawn."""
import re

from fedcore.report.graph import THICKEST, THINNEST, graph_drawing


def widths(drawing):
    return [float(width) for width in re.findall(r'stroke-width="([\d.]+)"', drawing)]


def test_every_peer_and_every_edge_is_drawn_and_the_fastest_edge_is_thickest():
    drawing = graph_drawing([(0, 1, 4.0), (1, 2, 1.0), (0, 7, 0.0)])
    assert drawing.count("<circle") == 4 and drawing.count("<line") == 3
    assert sorted(widths(drawing)) == [THINNEST, THICKEST / 2, THICKEST]
    assert "1 to 2: 1 exchanges per second" in drawing and ">7</text>" in drawing
    assert drawing.count("stroke-dasharray") == 1    # an edge that is never used


def test_edges_without_rates_are_equally_thin():
    drawing = graph_drawing([(0, 1, None), (1, 2, None)])
    assert widths(drawing) == [THINNEST, THINNEST] and "per second" not in drawing


def test_many_peers_are_drawn_small_and_unnamed_and_nobody_as_nothing():
    drawing = graph_drawing([(rank, rank + 1, 1.0) for rank in range(99)])
    assert drawing.count("<circle") == 100 and "<text" not in drawing and 'r="4.8"' in drawing
    assert graph_drawing([]) == ""
