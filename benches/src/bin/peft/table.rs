//! The record as tables in Markdown.

use crate::methods::{METHODS, Method};
use pt_benches::median;
use serde_json::Value;
use std::fmt::Write;

/// Values of one field in the lines of one part, tool, method and number format.
struct Lines<'a>(&'a [Value]);

impl Lines<'_> {
    fn values(&self, part: &str, method: &Method, tool: &str, dtype: &str, field: &str) -> Vec<f64> {
        let is_wanted = |line: &&Value| {
            line["part"] == part
                && line["method"] == method.name
                && line["tool"] == tool
                && line["dtype"] == dtype
                && line["learning_rate"] == method.learning_rate
        };
        self.0.iter().filter(is_wanted).filter_map(|line| line["measured"][field].as_f64()).collect()
    }

    /// Of the timed run on a quiet machine, else of the runs over seeds, which is marked.
    fn timed(&self, method: &Method, tool: &str, field: &str) -> Option<(f64, &'static str)> {
        let at = |part| self.values(part, method, tool, "f32", field);
        match (at("timing"), at("quality")) {
            (timed, _) if !timed.is_empty() => Some((median(timed), "")),
            (_, busy) if !busy.is_empty() => Some((median(busy), " *")),
            _ => None,
        }
    }
}

/// Both tables: ours, and beside the peers.
pub(crate) fn markdown(lines: &[Value]) -> String {
    let lines = Lines(lines);
    let mut text = String::from(
        "| method | held-out loss, nats | token accuracy, % | learning rate | trained parameters | file, MB | peak memory, GB | \
         step, s | step in bf16, s | decoding a token |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for method in &METHODS {
        let seeds = |field| lines.values("quality", method, "pt", "f32", field);
        let percent: Vec<f64> = seeds("held_out_accuracy").into_iter().map(|share| share * 100.0).collect();
        let size = |field, scale: f64, digits| {
            lines.timed(method, "pt", field).map_or("–".into(), |(value, _)| format!("{:.digits$}", value / scale))
        };
        let with_mark = |field, scale: f64, digits| {
            let timed = lines.timed(method, "pt", field);
            timed.map_or("–".into(), |(value, mark)| format!("{:.digits$}{mark}", value / scale))
        };
        let rate = if method.is_base() { "–".into() } else { format!("{:.0e}", method.learning_rate) };
        let in_bf16 = lines.values("timing", method, "pt", "bf16", "step_seconds");
        let in_bf16 = if in_bf16.is_empty() { "–".into() } else { format!("{:.2}", median(in_bf16)) };
        let alone = lines.timed(method, "pt", "decode_ms_per_token_alone");
        let latency = lines.timed(method, "pt", "decode_ms_per_token").zip(alone);
        let latency = latency.map_or("–".into(), |((with, _), (alone, _))| format!("{:.2}×", with / alone));
        let file = if method.is_base() { "–".into() } else { size("adapter_bytes", 1e6, 2) };
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {rate} | {} | {file} | {} | {} | {in_bf16} | {latency} |",
            method.name,
            spread(&seeds("held_out_loss"), 3),
            spread(&percent, 1),
            size("num_trainable", 1.0, 0),
            with_mark("peak_rss_bytes", 1e9, 2),
            with_mark("step_seconds", 1.0, 2),
        );
    }
    text += "\n`*`: from the runs over seeds, with smaller batches and beside other work; the others from the timed run.\n\n";
    text += "| method | peer | pt, nats | peer, nats | difference | pooled sd | within it | step time, pt / peer | peak memory, pt / peer |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n";
    for method in &METHODS {
        let Some(peer) = method.peer else { continue };
        let loss = |tool| lines.values("quality", method, tool, "f32", "held_out_loss");
        let (own, other) = (loss("pt"), loss(peer.name()));
        if other.is_empty() {
            continue;
        }
        let ratio = |field| {
            let pair = lines.timed(method, "pt", field).zip(lines.timed(method, peer.name(), field));
            match pair {
                Some(((own, mark), (other, other_mark))) if mark == other_mark => format!("{:.2}{mark}", own / other),
                _ => "–".into(),
            }
        };
        let (difference, pooled) = (mean(&own) - mean(&other), pooled_sd(&own, &other));
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} | {difference:+.3} | {pooled:.3} | {} | {} | {} |",
            method.name,
            peer.name(),
            spread(&own, 3),
            spread(&other, 3),
            if difference.abs() <= pooled { "yes" } else { "no" },
            ratio("step_seconds"),
            ratio("peak_rss_bytes"),
        );
    }
    text
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Sum of squared distances from the mean.
fn squares(values: &[f64]) -> f64 {
    values.iter().map(|value| (value - mean(values)).powi(2)).sum()
}

/// Standard deviation within two samples taken together.
fn pooled_sd(one: &[f64], other: &[f64]) -> f64 {
    let freedom = (one.len() + other.len()).saturating_sub(2);
    ((squares(one) + squares(other)) / freedom as f64).sqrt()
}

/// Mean ± standard deviation of the samples.
fn spread(values: &[f64], digits: usize) -> String {
    match values.len() {
        0 => "–".into(),
        1 => format!("{:.digits$}", values[0]),
        count => {
            let sd = (squares(values) / (count - 1) as f64).sqrt();
            format!("{:.digits$} ± {sd:.digits$}", mean(values))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_are_those_of_samples() {
        assert_eq!(spread(&[1.0, 2.0, 3.0], 2), "2.00 ± 1.00");
        assert_eq!(spread(&[1.5], 1), "1.5");
        assert_eq!(spread(&[], 1), "–");
        // Squares 2 and 8 over 4 degrees of freedom.
        assert!((pooled_sd(&[1.0, 2.0, 3.0], &[0.0, 2.0, 4.0]) - 2.5f64.sqrt()).abs() < 1e-12);
    }
}
