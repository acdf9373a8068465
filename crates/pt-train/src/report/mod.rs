//! `report.html`: a run on one page that needs nothing but a browser.
//!
//! Styles and plots stand in the file itself, it asks for no other, and it follows the reader's light or dark
//! setting. All text from data is escaped.

mod data;
mod plot;

pub use data::DataTable;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use plot::{Curve, Plot, STEP, significant};

use crate::error::Result;
use crate::metrics::{Series, names};

/// Which way a measured number should go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// A loss.
    Lower,
    /// An accuracy.
    Higher,
    /// Neither: a time, a count.
    Neither,
}

/// A number at the top of the report.
#[derive(Clone, Debug, PartialEq)]
pub struct Headline {
    /// What it is.
    pub label: String,
    /// Its value before training, where it was measured.
    pub before: Option<f64>,
    /// Its value at the end.
    pub after: f64,
    /// Unit, shown behind it; may be empty.
    pub unit: String,
    /// Which way it should go.
    pub better: Better,
}

/// An answer to a held-out prompt, before and after training.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// What was asked.
    pub prompt: String,
    /// The right answer, if there is one.
    pub expected: Option<String>,
    /// The model's answer before.
    pub before: Option<String>,
    /// The model's answer after.
    pub after: String,
}

/// A plot beside those of the metrics: curves over another quantity than steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figure {
    /// Heading.
    pub title: String,
    /// Unit of the values; may be empty.
    pub unit: String,
    /// What the x axis is.
    pub x: String,
    /// Curves by name, each of points `(x, value)`.
    pub curves: Vec<(String, Vec<(f64, f64)>)>,
}

/// Everything on the page. Parts that are empty are left out.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Heading.
    pub title: String,
    /// One line under it: model, method, machine.
    pub subtitle: String,
    /// Numbers at the top.
    pub headlines: Vec<Headline>,
    /// Metrics by name, as [`crate::metrics::MetricsWriter::series`] has them; names not known get a plot of their own.
    pub series: BTreeMap<String, Series>,
    /// What was found on held-out rows, plotted.
    pub figures: Vec<Figure>,
    /// The same in tables.
    pub findings: Vec<DataTable>,
    /// Pre-flight of each data set, under its name.
    pub data: Vec<DataTable>,
    /// Answers before and after.
    pub samples: Vec<Sample>,
    /// Facts of the run: versions, device, durations.
    pub facts: Vec<(String, String)>,
    /// The resolved configuration, as [`crate::config::flatten`] gives it.
    pub config: Vec<(String, String)>,
    /// What to type next.
    pub commands: Vec<String>,
}

impl Report {
    /// The page.
    pub fn to_html(&self) -> String {
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><title>{}</title>\n<style>\n{}</style></head>\n<body><main>\n",
            escape(&self.title),
            include_str!("style.css")
        );
        let _ =
            writeln!(page, "<h1>{}</h1>\n<p class=\"subtitle\">{}</p>", escape(&self.title), escape(&self.subtitle));
        if !self.headlines.is_empty() {
            let tiles: String = self.headlines.iter().map(tile).collect();
            let _ = writeln!(page, "<div class=\"tiles\">{tiles}</div>");
        }
        section(&mut page, "Training", &self.plots());
        section(&mut page, "Held-out rows", &self.findings_html());
        section(&mut page, "Before and after", &self.samples_html());
        section(&mut page, "Data", &self.data.iter().map(data_table).collect::<String>());
        if !self.commands.is_empty() {
            let commands = self.commands.iter().map(|command| escape(command)).collect::<Vec<_>>().join("\n");
            section(&mut page, "Next", &format!("<div class=\"card\"><pre class=\"commands\">{commands}</pre></div>"));
        }
        section(&mut page, "Run", &pairs(&self.facts));
        section(&mut page, "Configuration", &pairs(&self.config));
        let _ = writeln!(page, "<footer>Written by pt {}</footer>\n</main></body></html>", env!("CARGO_PKG_VERSION"));
        page
    }

    /// Writes the page, atomically.
    ///
    /// # Errors
    /// [`crate::TrainError::Write`].
    pub fn write(&self, path: &Path) -> Result<()> {
        crate::run_dir::write_atomic(path, self.to_html().as_bytes())
    }

    fn plots(&self) -> String {
        let points = |name: &str| self.series.get(name).map(Vec::as_slice).unwrap_or_default();
        let mebi: Series =
            points(names::MEMORY).iter().map(|&(step, bytes)| (step, bytes / f64::from(1 << 30))).collect();
        let curve = |name, points: &[(u64, f64)], smooth, dots| {
            let points = points.iter().map(|&(step, value)| (step as f64, value)).collect();
            Curve { name, points, smooth, dots }
        };
        let mut losses = vec![curve("training", points(names::LOSS), true, false)];
        if !points(names::EVAL_LOSS).is_empty() {
            losses.push(curve("held out", points(names::EVAL_LOSS), false, true));
        }
        let single = |title, unit, points, smooth, from_zero| Plot {
            title,
            unit,
            x: STEP,
            curves: vec![curve(title, points, smooth, false)],
            from_zero,
            wide: false,
        };
        let mut plots = vec![
            Plot { title: "Loss", unit: "nats a trained token", x: STEP, curves: losses, from_zero: false, wide: true },
            single("Learning rate", "", points(names::LEARNING_RATE), false, true),
            single("Gradient norm", "before clipping", points(names::GRAD_NORM), true, true),
            single("Speed", "tokens a second", points(names::TOKENS_PER_SECOND), true, true),
            single("Peak memory", "GiB", &mebi, false, true),
        ];
        let drawn = [
            names::LOSS,
            names::EVAL_LOSS,
            names::LEARNING_RATE,
            names::GRAD_NORM,
            names::TOKENS_PER_SECOND,
            names::MEMORY,
            names::EPOCH,
        ];
        for (name, series) in self.series.iter().filter(|(name, _)| !drawn.contains(&name.as_str())) {
            plots.push(single(name, "", series, true, false));
        }
        let cards: String = plots.iter().map(Plot::to_html).collect();
        if cards.is_empty() { cards } else { format!("<div class=\"charts\">\n{cards}</div>") }
    }

    fn findings_html(&self) -> String {
        let plot = |figure: &Figure| {
            let curves = figure.curves.iter();
            let curves = curves.map(|(name, points)| Curve { name, points: points.clone(), smooth: false, dots: true });
            let (title, unit, x) = (figure.title.as_str(), figure.unit.as_str(), figure.x.as_str());
            Plot { title, unit, x, curves: curves.collect(), from_zero: false, wide: false }.to_html()
        };
        let plots: String = self.figures.iter().map(plot).collect();
        let tables: String = self.findings.iter().map(data_table).collect();
        if plots.is_empty() { tables } else { format!("<div class=\"charts\">\n{plots}</div>{tables}") }
    }

    fn samples_html(&self) -> String {
        let part = |class: &str, title: &str, text: &str| {
            format!("<div class=\"{class}\"><h3>{title}</h3><pre>{}</pre></div>", escape(text.trim_end()))
        };
        let mut html = String::new();
        for sample in &self.samples {
            html.push_str("<div class=\"card sample\">");
            html.push_str(&part("prompt", "Prompt", &sample.prompt));
            if let Some(expected) = &sample.expected {
                html.push_str(&part("expected", "Expected", expected));
            }
            if let Some(before) = &sample.before {
                html.push_str(&part("before", "Before", before));
            }
            html.push_str(&part("after", "After", &sample.after));
            html.push_str("</div>\n");
        }
        if html.is_empty() { html } else { format!("<div class=\"samples\">\n{html}</div>") }
    }
}

fn section(page: &mut String, title: &str, content: &str) {
    if !content.is_empty() {
        let _ = writeln!(page, "<h2>{title}</h2>\n{content}");
    }
}

fn tile(headline: &Headline) -> String {
    let mut html = format!(
        "<div class=\"card tile\"><div class=\"label\">{}</div><div class=\"value\">{} <span class=\"unit\">{}</span></div>",
        escape(&headline.label),
        significant(headline.after),
        escape(&headline.unit)
    );
    if let Some(before) = headline.before {
        let gain = match headline.better {
            Better::Lower => before - headline.after,
            Better::Higher => headline.after - before,
            Better::Neither => 0.0,
        };
        let class = if gain > 0.0 {
            "good"
        } else if gain < 0.0 {
            "bad"
        } else {
            ""
        };
        let change = headline.after - before;
        let sign = if change > 0.0 { "+" } else { "" };
        let change = significant(change).replace('-', "\u{2212}");
        let _ = write!(
            html,
            "<div class=\"change\">before {} · <span class=\"{class}\">{sign}{change}</span></div>",
            significant(before)
        );
    }
    html.push_str("</div>");
    html
}

fn data_table(table: &DataTable) -> String {
    let head: String = table.head.iter().map(|title| format!("<th class=\"number\">{}</th>", escape(title))).collect();
    let mut html = format!("<div class=\"card\"><table><tr><th>{}</th>{head}</tr>", escape(&table.name));
    for (source, cells) in &table.sources {
        let cells: String = cells.iter().map(|cell| format!("<td class=\"number\">{}</td>", escape(cell))).collect();
        let _ = write!(html, "<tr><td>{}</td>{cells}</tr>", escape(source));
    }
    html.push_str("</table>");
    for (class, lines) in [("notes", &table.notes), ("warnings", &table.warnings)] {
        if !lines.is_empty() {
            let items: String = lines.iter().map(|line| format!("<li>{}</li>", escape(line))).collect();
            let _ = write!(html, "<ul class=\"{class}\">{items}</ul>");
        }
    }
    html.push_str("</div>\n");
    html
}

fn pairs(pairs: &[(String, String)]) -> String {
    if pairs.is_empty() {
        return String::new();
    }
    let row = |(name, value): &(String, String)| {
        format!("<tr><td class=\"name\">{}</td><td class=\"data\">{}</td></tr>", escape(name), escape(value))
    };
    format!("<div class=\"card columns\"><table>{}</table></div>", pairs.iter().map(row).collect::<String>())
}

/// Thousands set apart by thin spaces.
fn grouped(count: usize) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // A browser refuses these even when escaped.
            character if character.is_control() && !matches!(character, '\n' | '\t') => out.push('\u{fffd}'),
            character => out.push(character),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{PreflightSummary, SourceSummary};

    fn full() -> Report {
        let wave = |step: u64| (step as f64 * 12.9898).sin() * 0.5;
        let series = |value: &dyn Fn(u64) -> f64| (1..=240).map(|step| (step, value(step))).collect::<Series>();
        let mut all = BTreeMap::new();
        all.insert(
            names::LOSS.to_owned(),
            series(&|step| 1.1 + 1.6 * (-(step as f64) / 60.0).exp() + 0.25 * wave(step)),
        );
        all.insert(
            names::EVAL_LOSS.to_owned(),
            (0..=6).map(|i| (i * 40, 1.15 + 1.5 * (-(i as f64) * 40.0 / 60.0).exp())).collect(),
        );
        all.insert(
            names::LEARNING_RATE.to_owned(),
            series(&|step| {
                2e-4 * (step as f64 / 12.0).min(1.0) * 0.5 * (1.0 + (step as f64 / 240.0 * std::f64::consts::PI).cos())
            }),
        );
        all.insert(
            names::GRAD_NORM.to_owned(),
            series(&|step| 0.8 + 3.0 * (-(step as f64) / 30.0).exp() + 0.3 * wave(step)),
        );
        all.insert(names::TOKENS_PER_SECOND.to_owned(), series(&|step| 410.0 + 30.0 * wave(step * 3)));
        all.insert(names::MEMORY.to_owned(), series(&|step| 1.4e9 + 2e8 * (step as f64 / 20.0).min(1.0)));
        let source = SourceSummary {
            name: "boolq".into(),
            rows: 2400,
            kept: 2381,
            over_long: 19,
            dropped_long: 19,
            duplicates: 3,
            stop_trained: 2381,
            tokens: 412_345,
            labels: 9_524,
            length_min: 61,
            length_median: 164,
            length_p95: 310,
            length_max: 512,
            ..SourceSummary::default()
        };
        let headline = |label: &str, before, after, unit: &str, better| Headline {
            label: label.into(),
            before,
            after,
            unit: unit.into(),
            better,
        };
        Report {
            title: "SmolLM2-135M-Instruct on BoolQ".into(),
            subtitle: "LoRA, rank 16, all linear layers · 240 steps of 8 rows · 2 CPU cores, bf16".into(),
            headlines: vec![
                headline("Held-out loss", Some(2.6512), 1.1782, "nats", Better::Lower),
                headline("Accuracy on 200 held-out rows", Some(51.5), 68.0, "%", Better::Higher),
                headline("Speed", None, 412.3, "tokens/s", Better::Neither),
                headline("Time", None, 7.4, "min", Better::Neither),
            ],
            series: all,
            figures: vec![Figure {
                title: "Reliability".into(),
                unit: "share".into(),
                x: "predicted".into(),
                curves: vec![("observed".into(), vec![(0.55, 0.6), (0.75, 0.7), (0.95, 0.9)])],
            }],
            findings: vec![DataTable {
                name: "Accuracy by source".into(),
                head: vec!["pairs"],
                sources: vec![("gpt4".into(), vec!["120".into()])],
                ..DataTable::default()
            }],
            data: vec![DataTable::of_rows("Training", &PreflightSummary { max_length: 512, sources: vec![source], warnings: vec!["boolq: 19 rows (0.8 %) are longer than 512 tokens and left out".into()] })],
            samples: vec![Sample {
                prompt: "Persian language -- Persian is <one> of the Western Iranian languages…\n\nQuestion: do iran and afghanistan speak the same language?".into(),
                expected: Some("Yes".into()),
                before: Some("Iran and Afghanistan are two countries in the Middle East. While both share a border, their languages have developed in different ways.".into()),
                after: "Yes".into(),
            }],
            facts: [("model", "SmolLM2-135M-Instruct"), ("device", "cpu"), ("pt", "0.1.0")].map(|(a, b)| (a.to_owned(), b.to_owned())).into(),
            config: (0..24).map(|i| (format!("section.field_{i}"), format!("{}", i * i))).collect(),
            commands: vec!["pt chat --model smollm2 --adapter runs/demo/adapter".into()],
        }
    }

    #[test]
    fn the_page_stands_alone_and_holds_every_part() {
        let html = full().to_html();
        for part in [
            "Held-out loss",
            "<svg",
            "Gradient norm",
            "Peak memory",
            "2\u{202f}381",
            "Before",
            "section.field_3",
            "Held-out rows",
            "observed at predicted 0.75: 0.7 share",
            "Accuracy by source",
            "pt chat",
            "prefers-color-scheme",
        ] {
            assert!(html.contains(part), "no {part}");
        }
        for outside in ["http://", "https://", "<script", "<link", "@import", "url("] {
            assert!(!html.contains(outside), "{outside}");
        }
        assert!(html.contains("before 2.6512 · <span class=\"good\">\u{2212}1.473</span>"), "a fallen loss is good");
        assert!(html.contains("&lt;one&gt;") && !html.contains("<one>"));
        let folder = tempfile::tempdir().expect("temporary folder");
        full().write(&folder.path().join("report.html")).expect("writes");
    }

    #[test]
    fn an_empty_report_is_still_a_page() {
        let html = Report { title: "a & b".into(), ..Report::default() }.to_html();
        assert!(html.contains("<h1>a &amp; b</h1>") && !html.contains("<h2>"));
        let nan = BTreeMap::from([("loss".to_owned(), vec![(1, f64::NAN)])]);
        assert!(!Report { series: nan, ..Report::default() }.to_html().contains("<svg"));
    }
}
