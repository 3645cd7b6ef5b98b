"""The record of v0: what is the same in every report."""

import torch

from hf_v0init.records import report
from hf_v0init.records.report import collect_versions


def test_versions_are_read_once(monkeypatch):
    versions = collect_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0] and "hf_v0init" in versions
    monkeypatch.setattr(report, "version", lambda package: 1 / 0)
    assert collect_versions() == versions
