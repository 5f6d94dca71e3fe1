"""The graphs that a file can name."""
import networkx
import pytest
from hypothesis import given
from hypothesis.strategies import integers, sampled_from

from fedcore.errors import BadInput, DisconnectedGraph, InvalidSetting, MalformedGraph, MissingData
from fedcore.registry import build, check, names


def graph(spec, num_nodes, seed=0):
    return build("graphs", spec).graph(num_nodes, seed)


def same_shape(found, expected):
    ours = networkx.Graph(found.edges)
    ours.add_nodes_from(range(found.num_nodes))
    return networkx.is_isomorphic(ours, expected)


@pytest.mark.parametrize("spec, size, expected", [
    ("complete", 5, networkx.complete_graph(5)),
    ("ring", 6, networkx.cycle_graph(6)),
    ("star", 6, networkx.star_graph(5)),
    ("path", 6, networkx.path_graph(6)),
    ("grid", 12, networkx.grid_2d_graph(3, 4)),
    ({"name": "grid", "rows": 2}, 12, networkx.grid_2d_graph(2, 6)),
    ({"name": "grid", "rows": 1}, 5, networkx.path_graph(5)),
    ("torus", 12, networkx.grid_2d_graph(3, 4, periodic=True)),
    ("hypercube", 16, networkx.hypercube_graph(4)),
    ("exponential", 8, networkx.circulant_graph(8, [1, 2, 4])),
    ("exponential", 6, networkx.circulant_graph(6, [1, 2, 4])),
    ("barbell", 10, networkx.barbell_graph(5, 0)),
    ({"name": "barbell", "bridge": 3}, 11, networkx.barbell_graph(4, 3)),
])
def test_named_graphs_are_what_their_names_say(spec, size, expected):
    assert same_shape(graph(spec, size), expected)


@pytest.mark.parametrize("name", ["complete", "ring", "star", "path", "exponential"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_graphs_have_no_edge_too_many(name, size):
    assert len(graph(name, size).edges) == {1: 0, 2: 1}.get(size, 2 if name in ("star", "path") else 3)


@given(integers(2, 40), integers(0, 10), sampled_from([name for name in names("graphs") if name != "file"]))
def test_every_size_gives_a_connected_graph_or_a_named_error(size, seed, name):
    try:
        found = graph(name, size, seed)
    except InvalidSetting as error:
        assert str(size) in str(error)
    else:
        assert found.num_nodes == size and found == graph(name, size, seed)


@given(integers(5, 30), integers(2, 4), integers(0, 5))
def test_everybody_in_a_random_regular_graph_has_equally_many_neighbours(size, degree, seed):
    found = graph({"name": "random_regular", "degree": degree}, size + size * degree % 2, seed)
    assert {found.degree(node) for node in range(found.num_nodes)} == {degree}


@pytest.mark.parametrize("name", ["random_regular", "random_geometric"])
def test_random_graphs_follow_the_seed(name):
    drawn = [graph(name, 20, seed) for seed in range(4)]
    assert len({found.edges for found in drawn}) == 4


@pytest.mark.parametrize("spec, size, setting", [
    ("grid", 7, "clients.count"), ({"name": "grid", "rows": 3}, 7, "rows"), ("torus", 8, "clients.count"),
    ({"name": "torus", "rows": 3}, 6, "rows"), ("hypercube", 12, "clients.count"),
    ({"name": "random_regular", "degree": 5}, 5, "degree"), ({"name": "random_regular", "degree": 3}, 7, "degree"),
    ("barbell", 7, "bridge"), ({"name": "barbell", "bridge": 4}, 6, "bridge"),
])
def test_a_size_that_a_graph_cannot_have_is_refused_by_name(spec, size, setting):
    with pytest.raises(InvalidSetting) as caught:
        graph(spec, size)
    assert caught.value.name == setting


@pytest.mark.parametrize("spec", [
    {"name": "grid", "rows": 0}, {"name": "torus", "rows": 2}, {"name": "random_regular", "degree": 0},
    {"name": "random_geometric", "radius": 0.0}, {"name": "random_geometric", "radius": 1.6},
    {"name": "barbell", "bridge": -1}, {"name": "ring", "rows": 3}, "rings", {"name": "grid", "rows": "two"},
])
def test_settings_out_of_range_are_refused_before_the_size_is_known(spec):
    with pytest.raises(InvalidSetting) as caught:
        build("graphs", spec)
    assert caught.value.name.startswith("strategy.graph")


def test_a_radius_too_small_to_connect_anybody_is_refused():
    with pytest.raises(DisconnectedGraph, match="denser"):
        graph({"name": "random_geometric", "radius": 0.01}, 10)


def test_a_file_lists_edges_with_comments_and_either_separator(tmp_path):
    (tmp_path / "edges.txt").write_text("# three in a row\n0 1\n\n2,1   # back to front\n1 2\n")
    assert graph({"name": "file", "path": str(tmp_path / "edges.txt")}, 3).edges == ((0, 1), (1, 2))


@pytest.mark.parametrize("text, size, error, words", [
    ("0 1\n1 x\n", 2, MalformedGraph, "line 2: '1 x'"), ("0 1 2\n", 3, MalformedGraph, "line 1"),
    ("0 -1\n", 2, MalformedGraph, "line 1"), ("0 1\n1 2\n", 2, MalformedGraph, "edges.txt.*edge 1 - 2"),
    ("0 1\n2 3\n", 4, DisconnectedGraph, "edges.txt is not connected"), ("0 1\n", 3, DisconnectedGraph, "2 parts"),
    ("0 0\n0 1\n", 2, MalformedGraph, "to itself"), ("0 ²\n", 2, MalformedGraph, "line 1"),
])
def test_files_that_are_no_graph_are_refused_with_the_place(tmp_path, text, size, error, words):
    (tmp_path / "edges.txt").write_text(text, encoding="utf-8")
    with pytest.raises(error, match=words) as caught:
        graph({"name": "file", "path": str(tmp_path / "edges.txt")}, size)
    assert isinstance(caught.value, BadInput)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(MissingData):
        build("graphs", {"name": "file", "path": str(tmp_path / "none.txt")})
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MissingData, match="cannot be read"):
        build("graphs", {"name": "file", "path": str(tmp_path / "bytes")})


def test_a_file_is_found_beside_the_experiment(tmp_path):
    (tmp_path / "edges.txt").write_text("0 1\n")
    checked, problems = check("graphs", {"name": "file", "path": "edges.txt"}, "strategy.graph", tmp_path)
    assert problems == [] and checked["path"] == str(tmp_path / "edges.txt")


def test_a_class_that_is_no_topology_is_refused():
    with pytest.raises(InvalidSetting, match="a Topology"):
        build("graphs", "builtins:dict")
