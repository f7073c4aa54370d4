//! A page with the picture and the report.

use migration::{Report, Round};

use super::draw::{self, DrawError};
use super::figures::{bytes, duration, known, predicted, rate};
use super::trace::Trace;

const STYLE: &str = "body{font:15px/1.5 sans-serif;color:#222b36;max-width:1040px;margin:2em auto;padding:0 1em}\
svg{max-width:100%;height:auto}table{border-collapse:collapse;margin:1em 0}caption{text-align:left;font-weight:bold}\
td,th{padding:.2em 1.2em .2em 0;text-align:left;border-bottom:1px solid #e3e7ec;font-variant-numeric:tabular-nums}\
th{font-weight:normal;color:#6b7684}.error{color:#c0392b}";

/// A page that needs nothing but itself.
pub(crate) fn html(trace: &Trace) -> Result<String, DrawError> {
    let title = escape(&draw::title(trace));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{STYLE}</style></head>\n<body>\n<figure style=\"margin:0\">{}</figure>\n",
        draw::svg(trace)?
    );
    match &trace.report {
        Some(report) => {
            if let Some(error) = &report.error {
                page.push_str(&format!("<p class=\"error\">{}</p>\n", escape(error)));
            }
            table(&mut page, "The report", &[], &figures(report));
            let heads = [
                "round",
                "pages",
                "bytes",
                "time",
                "dirty rate",
                "bandwidth",
                "throttle",
            ];
            let rounds: Vec<Vec<String>> = report.rounds.iter().map(round).collect();
            table(&mut page, "Pre-copy rounds", &heads, &rounds);
        }
        None => page.push_str("<p class=\"error\">The trace has no report.</p>\n"),
    }
    page.push_str("</body>\n</html>\n");
    Ok(page)
}

fn figures(report: &Report) -> Vec<Vec<String>> {
    let terms = &report.downtime;
    let mut rows = vec![
        ("downtime", known(report.downtime_ms)),
        (
            "predicted downtime",
            predicted(
                report.predicted_downtime_ms,
                report.predicted_downtime_interval_ms,
            ),
        ),
        ("budget", duration(report.budget_ms)),
        ("pause", duration(terms.pause_ms)),
        ("drain devices", duration(terms.drain_ms)),
        ("last log", duration(terms.final_log_ms)),
        ("last copy", duration(terms.final_copy_ms)),
        ("state", duration(terms.state_ms)),
        ("restore", duration(terms.restore_ms)),
        ("commit", duration(terms.commit_ms)),
        ("resume", duration(terms.resume_ms)),
        ("total time", duration(report.total_ms)),
        (
            "predicted total time",
            predicted(report.predicted_total_ms, report.predicted_total_interval_ms),
        ),
        ("sent", bytes(report.bytes_sent as f64)),
        ("pages", report.pages_sent.to_string()),
        ("zero pages", report.pages_zero.to_string()),
        ("unused pages", report.pages_unused.to_string()),
        ("streams", report.streams.to_string()),
    ];
    if let Some(digest) = &report.memory_digest {
        rows.push(("digests took", duration(report.verify_ms)));
        rows.push(("digest at the source", digest.source.clone()));
        rows.push(("digest at the destination", digest.destination.clone()));
    }
    rows.into_iter()
        .map(|(name, value)| vec![name.to_owned(), value])
        .collect()
}

fn round(round: &Round) -> Vec<String> {
    vec![
        round.n.to_string(),
        round.pages.to_string(),
        bytes(round.bytes as f64),
        duration(round.ms),
        rate(round.dirty_bytes_per_s),
        rate(round.bandwidth_bytes_per_s),
        format!("{:.0} %", round.throttle_percent),
    ]
}

fn table(page: &mut String, caption: &str, heads: &[&str], rows: &[Vec<String>]) {
    let row = |tag: &str, cells: &mut dyn Iterator<Item = &str>| {
        let cells: String = cells
            .map(|text| format!("<{tag}>{}</{tag}>", escape(text)))
            .collect();
        format!("<tr>{cells}</tr>\n")
    };
    page.push_str(&format!("<table><caption>{caption}</caption>\n"));
    if !heads.is_empty() {
        page.push_str(&row("th", &mut heads.iter().copied()));
    }
    for cells in rows {
        page.push_str(&row("td", &mut cells.iter().map(String::as_str)));
    }
    page.push_str("</table>\n");
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    #[test]
    fn the_page_is_whole_and_carries_nothing_in() {
        let mut trace = testing::trace();
        if let Some(report) = &mut trace.report {
            report.error = Some("<script>alert(1)</script>".into());
        }
        let page = html(&trace).unwrap();
        assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
        assert_eq!(
            (page.matches("<svg ").count(), page.matches("</svg>").count()),
            (1, 1)
        );
        for part in [
            "<td>last copy</td><td>35.4 ms</td>",
            "<td>2</td><td>131072</td><td>512 MiB</td>",
        ] {
            assert!(page.contains(part), "no {part}");
        }
        assert!(!page.contains("<script>") && !page.contains("<more>"));
        assert!(!page.contains(" src=") && !page.contains("href="));
        assert_eq!(page.matches("<tr>").count(), page.matches("</tr>").count());
    }

    #[test]
    fn without_a_report_it_says_so() {
        let mut trace = testing::trace();
        trace.report = None;
        assert!(html(&trace).unwrap().contains("The trace has no report."));
    }
}
