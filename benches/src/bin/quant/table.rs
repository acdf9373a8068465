//! The contests as tables in Markdown.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;

use crate::contest::is_near;
use pt_benches::median;

/// How one anchor was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Below,
    Nearly,
    NotMeasured,
    Unsteady,
    ShortOfAim,
    Gate,
    Aim,
    Shown,
}

impl Verdict {
    fn of(anchor: &Value, is_steady: bool) -> Self {
        let (gate, aim) = (anchor["gate"].as_f64(), anchor["aim"].as_f64());
        if gate.is_none() && aim.is_none() {
            return Self::Shown;
        }
        let Some(ratio) = anchor["ratio"].as_f64() else { return Self::NotMeasured };
        match (gate, aim) {
            _ if !is_steady => Self::Unsteady,
            (_, Some(aim)) if ratio >= aim => Self::Aim,
            (Some(gate), _) if ratio >= gate => Self::Gate,
            (Some(gate), _) if ratio >= 0.9 * gate => Self::Nearly,
            (Some(_), _) => Self::Below,
            (None, _) => Self::ShortOfAim,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Below => "**below the gate**",
            Self::Nearly => "within 10 % of the gate",
            Self::NotMeasured => "not measured",
            Self::Unsteady => "not judged: the roof moved",
            Self::ShortOfAim => "short of the aim",
            Self::Gate => "holds",
            Self::Aim => "aim reached",
            Self::Shown => "",
        }
    }
}

/// All lines of all contests, each anchor with what was measured on one thread and on all.
pub(crate) fn markdown(lines: &[Value]) -> String {
    let threads: Vec<u64> = unique(lines.iter().filter_map(|line| line["threads"].as_u64()));
    let mut text =
        String::from("## By row\n\n| row | gates on one thread | aims on one thread |\n| --- | --- | --- |\n");
    for (row, (gates, aims)) in summary(lines) {
        let _ = writeln!(text, "| {row} | {gates} | {aims} |");
    }
    text += "\n## Every contest\n\nA ratio is the anchor's time over ours: how many times as fast we are, of a roof the share that \
             is reached. Times are the 10th percentile of the calls, in microseconds.\n\n";
    text += "| row | kernel | anchor | gate | aim |";
    for threads in &threads {
        let _ = write!(text, " ratio, {threads} thr. | ours / anchor, µs |");
    }
    text += " verdict, 1 thread |\n| --- | --- | --- | --- | --- |";
    text += &" --- | --- |".repeat(threads.len());
    text += " --- |\n";
    let contests = unique(lines.iter().filter_map(|line| Some((line["row"].as_u64()?, line["kernel"].as_str()?))));
    for (row, kernel) in contests {
        let of = |threads: u64| {
            lines.iter().find(|line| line["kernel"] == kernel && line["row"] == row && line["threads"] == threads)
        };
        let Some(first) = threads.iter().find_map(|&threads| of(threads)) else { continue };
        for (index, anchor) in first["anchors"].as_array().into_iter().flatten().enumerate() {
            let number = |value: &Value| value.as_f64().map_or("–".to_owned(), |value| format!("{value}"));
            let (what, gate, aim) = (anchor["what"].as_str().unwrap_or(""), &anchor["gate"], &anchor["aim"]);
            let _ = write!(text, "| {row} | {kernel} | {what} | {} | {} |", number(gate), number(aim));
            for &threads in &threads {
                let line = of(threads).unwrap_or(&Value::Null);
                let anchor = &line["anchors"][index];
                let ratio = anchor["ratio"].as_f64().map_or("–".to_owned(), |ratio| format!("{ratio:.2}"));
                let time = |value: &Value| value.as_f64().map_or("–".to_owned(), |time| format!("{time:.0}"));
                let (ours, theirs) = (time(&line["microseconds"]), time(&anchor["microseconds"]));
                let _ = write!(text, " {ratio} | {ours} / {theirs} |");
            }
            let verdict =
                of(1).map_or(Verdict::Shown, |line| Verdict::of(&line["anchors"][index], is_steady(line, lines)));
            let _ = writeln!(text, " {} |", verdict.words());
        }
    }
    text
}

/// Of each row, whether all gates hold and all aims are reached on one thread.
fn summary(lines: &[Value]) -> BTreeMap<u64, (String, String)> {
    let mut verdicts: BTreeMap<u64, Vec<(Verdict, &Value)>> = BTreeMap::new();
    for line in lines.iter().filter(|line| line["threads"] == 1) {
        let Some(row) = line["row"].as_u64() else { continue };
        let steady = is_steady(line, lines);
        let anchors = line["anchors"].as_array().into_iter().flatten();
        verdicts.entry(row).or_default().extend(anchors.map(|anchor| (Verdict::of(anchor, steady), anchor)));
    }
    let words = |(row, all): (u64, Vec<(Verdict, &Value)>)| {
        let count = |field: &str, good: &[Verdict]| {
            let of_field: Vec<Verdict> =
                all.iter().filter(|(_, anchor)| anchor[field].is_number()).map(|(verdict, _)| *verdict).collect();
            let number = |wanted: &[Verdict]| of_field.iter().filter(|verdict| wanted.contains(verdict)).count();
            let mut text = match (number(good), of_field.len()) {
                (_, 0) => return "–".to_owned(),
                (good, total) if good == total => format!("all {total}"),
                (good, total) => format!("{good} of {total}"),
            };
            for (wanted, note) in [(Verdict::Nearly, "within 10 %"), (Verdict::Unsteady, "not judged")] {
                let found = number(&[wanted]);
                if found > 0 && (field == "gate" || wanted == Verdict::Unsteady) {
                    let _ = write!(text, ", {found} {note}");
                }
            }
            text
        };
        (row, (count("gate", &[Verdict::Gate, Verdict::Aim]), count("aim", &[Verdict::Aim])))
    };
    verdicts.into_iter().map(words).collect()
}

/// Whether the read roof of this contest was near the median of all contests on as many threads.
fn is_steady(line: &Value, lines: &[Value]) -> bool {
    let roof = |line: &Value| line["read_roof_gb_s"].as_f64().unwrap_or(0.0);
    let all = lines.iter().filter(|other| other["threads"] == line["threads"]).map(roof).collect();
    is_near(roof(line), median(all))
}

fn unique<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    values.fold(Vec::new(), |mut all, value| {
        if !all.contains(&value) {
            all.push(value);
        }
        all
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn verdicts_follow_gate_and_aim() {
        let verdict = |ratio: f64, gate: Option<f64>, aim: Option<f64>| {
            Verdict::of(&json!({"ratio": ratio, "gate": gate, "aim": aim}), true)
        };
        assert_eq!(verdict(2.0, Some(1.0), Some(2.0)), Verdict::Aim);
        assert_eq!(verdict(1.5, Some(1.0), Some(2.0)), Verdict::Gate);
        assert_eq!(verdict(0.95, Some(1.0), Some(2.0)), Verdict::Nearly);
        assert_eq!(verdict(0.5, Some(1.0), Some(2.0)), Verdict::Below);
        assert_eq!(verdict(0.5, None, Some(2.0)), Verdict::ShortOfAim);
        assert_eq!(verdict(0.5, None, None), Verdict::Shown);
        assert_eq!(Verdict::of(&json!({"gate": 1.0, "skipped": "why"}), true), Verdict::NotMeasured);
        assert_eq!(Verdict::of(&json!({"gate": 1.0, "ratio": 3.0}), false), Verdict::Unsteady);
    }

    #[test]
    fn a_table_joins_threads_and_counts_gates() {
        let line = |threads: u64, ratio: f64| {
            json!({"row": 6, "kernel": "k", "threads": threads, "microseconds": 10.0, "read_roof_gb_s": 20.0,
                "anchors": [{"what": "a", "gate": 1.0, "aim": 2.0, "ratio": ratio, "microseconds": 15.0}]})
        };
        let text = markdown(&[line(1, 1.5), line(2, 0.5)]);
        assert!(text.contains("| 6 | all 1 | 0 of 1 |"), "{text}");
        assert!(text.contains("| 6 | k | a | 1 | 2 | 1.50 | 10 / 15 | 0.50 | 10 / 15 | holds |"), "{text}");
    }
}
