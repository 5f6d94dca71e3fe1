"""That a failed test can be reported, whatever the garbage collector does meanwhile."""
import ast
import gc
import inspect


class Garbage:
    """Parses when the collector ends it, deeper in the stack than whoever parses at that time."""

    def __init__(self):
        self.me = self

    def __del__(self):
        parse_below(20)


def parse_below(depth):
    return parse_below(depth - 1) if depth else ast.parse("a.b(c)")


def test_source_is_parsed_while_garbage_waits_whose_end_parses_too():
    thresholds, source = gc.get_threshold(), inspect.getsource(inspect)
    gc.set_threshold(50)
    try:
        for _ in range(10):
            for _ in range(20):
                Garbage()
            assert len(ast.parse(source).body) > 50
    finally:
        gc.set_threshold(*thresholds)
