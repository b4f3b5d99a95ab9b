"""Reports name the processor and its instruction set."""

import pytest

from benchmarks.machine import describe_cpu, read_machine, read_processor

ZEN_3 = "processor\t: 0\nmodel name\t: AMD EPYC 7763\nflags\t\t: fpu sse2 avx avx2 fma\n"
ZEN_4 = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9654\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"


def test_the_extensions_are_read_as_whole_words() -> None:
    assert read_processor(ZEN_3) == {"model": "AMD EPYC 7763", "extensions": ["avx2"]}
    zen_4 = read_processor(ZEN_4)
    assert zen_4["extensions"] == ["avx2", "avx512f", "avx512_bf16"]
    assert zen_4["model"] == "AMD EPYC 9654 (family 25, model 17)"
    assert read_processor("") == {"model": "unknown", "extensions": []}


def test_a_report_says_which_instructions_torch_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    machine = read_machine()
    assert machine["limits"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"} and machine["cpu_capability"]
    shown = describe_cpu(read_processor(ZEN_3) | {"cpu_capability": "AVX2", "limits": machine["limits"]})
    assert shown == "AMD EPYC 7763 with AVX2, avx2, limited by ONEDNN_MAX_CPU_ISA=AVX2"
