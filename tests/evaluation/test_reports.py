"""Reports: rounding, units, and report.json of earlier versions."""

from __future__ import annotations

import json

from stepdistill.evaluation.reports.report import ProtocolRecord, Report, ReportRow, table

RECORD = ProtocolRecord("prompts", "a", 10, "", "", "b", 10, "", "round", "judge", "c", "none", "clip 12", "0.1.0")


def test_a_distance_that_rounding_made_negative_is_shown_as_zero_and_recorded_as_it_is() -> None:
    """pytorch-fid 105: FID -4.8e-9."""
    row = ReportRow("x", 1, 1, 1.0, "", 10, None, {"fid": -4.8e-9, "kid": -0.02})
    assert table([row]) == [["", "steps", "calls", "w", "fid", "kid x 1000"], ["x", "1", "1", "1", "0", "-0.02"]]
    assert row.metrics["fid"] == -4.8e-9


def test_a_report_of_an_earlier_version_is_read() -> None:
    """Its record names the scorers `beside`, and it has neither source nor units."""
    report = Report(RECORD, (ReportRow("x", 1, 1, 1.0, "", 10, None, {"fid": 2.0}),))
    content = json.loads(report.to_json())
    content["protocol"]["beside"] = content["protocol"].pop("scorers")
    del content["source"], content["units"]
    assert Report.from_json(json.dumps(content), "report.json") == report
