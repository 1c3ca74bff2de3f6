"""What is counted in a compiled program, and held to a budget."""

from experiments.common.described_gpu import Program, parse
from experiments.kernels import exceeded

# A kernel, a loop of three trips of two kernels, and a loop of unknown length: one
# kernel, a library call, a branch of one kernel and one of a loop of five trips and
# another one of unknown length.
_TEXT = """
%five (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  ROOT %f.1 = f32[2]{0} fusion(%a), kind=kLoop, calls=%x
}
%three (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %f.2 = f32[2]{0} fusion(%a), kind=kLoop, calls=%x
  ROOT %f.3 = (f32[2]{0}, /*index=1*/f32[2]{0}) fusion(%f.2), kind=kLoop, calls=%x
}
%yes (a: f32[2]) -> f32[2] {
  ROOT %f.4 = f32[2]{0} fusion(%a), kind=kLoop, calls=%x
}
%no (a: f32[2]) -> f32[2] {
  %w.0 = f32[2]{0} while(%a), condition=%y, body=%five
  ROOT %w.1 = f32[2]{0} while(%w.0), body=%five, k={"known_trip_count":{"n":"5"}}
}
%unknown (a: f32[2]) -> f32[2] {
  %f.5 = f32[2]{0} fusion(%a), kind=kLoop, calls=%x
  %g = f32[2]{0} custom-call(%f.5), custom_call_target="__cublas$gemm"
  ROOT %c = f32[2]{0} conditional(%p, %g, %g), branch_computations={%yes, %no}
}
ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %f.6 = f32[2]{0} fusion(%a), kind=kLoop, calls=%x
  %w.2 = f32[2]{0} while(%f.6), body=%three, k={"known_trip_count":{"n":"3"}}
  ROOT %w.3 = f32[2]{0} while(%w.2), condition=%y, body=%unknown
}
"""


def test_counts_of_a_program():
    assert Program(parse(_TEXT), 1.5, 8).counts() == {
        "once": 1 + 3 * 2,
        "iteration": 1 + 1 + 1,
        "in_loops": 5,
        "round_trips": 3,
        "unknown_loops": 1,
        "longest_loop": 5,
        "library_calls": 1,
        "temporary_bytes": 8,
        "compile_seconds": 1.5,
    }


def test_what_exceeds_its_budget_is_named():
    results = {"cells": {"gru": {"deer": {"once": 5, "iteration": 7}}}}
    budgets = {"gru": {"once": 5, "iteration": 6}, "cnf": {"once": 0}}
    assert exceeded(results, budgets) == ["gru: iteration is 7; at most 6."]
